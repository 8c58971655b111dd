"""What a run leaves for people: a page, curves, versions; and what reads its log."""
