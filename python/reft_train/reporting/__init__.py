"""Reports of a run: HTML pages, curves, versions, and a reader of its log."""
