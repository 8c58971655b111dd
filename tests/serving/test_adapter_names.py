"""Names of adapters: versions, replacement and unloading while requests run. Needs no vLLM."""

from __future__ import annotations

import asyncio
import gc

import pytest

from reft_kernels.serving.vllm.adapter_names import AdapterNames, check_name


class _Engine:
    """Records what is loaded, and refuses folders named "bad"."""

    def __init__(self):
        self.loaded: dict[str, str] = {}

    async def load(self, key, folder):
        await asyncio.sleep(0)
        if folder == "bad":
            raise ValueError("folder: got bad")
        self.loaded[key] = folder
        return {"rank": 4}

    async def unload(self, key):
        await asyncio.sleep(0)
        del self.loaded[key]


def _accept(output):
    assert output in (0, 1, 2)


async def _outputs(count=3):
    for number in range(count):
        yield number


def _run(scenario):
    async def run():
        engine, table = _Engine(), {}

        def changed(name, version):
            if version is None:
                del table[name]
            else:
                table[name] = version

        names = AdapterNames(engine, lambda: {"base"}, changed)
        await scenario(names, engine, table)

    asyncio.run(run())


def test_a_replaced_adapter_stays_until_its_last_request_ends():
    async def scenario(names, engine, table):
        old = await names.load("a", "one")
        first, second = (names.holding(old, _outputs(), _accept) for _ in range(2))
        assert await anext(first) == 0
        new = await names.load("a", "two")
        assert names.get("a") is new is table["a"] and old.key != new.key
        assert [item async for item in first] == [1, 2]
        await names.drained()
        assert engine.loaded == {old.key: "one", new.key: "two"} and names.retired == [old]
        assert [item async for item in second] == [0, 1, 2]
        await names.drained()
        assert engine.loaded == {new.key: "two"} and not names.retired

    _run(scenario)


def test_an_unloaded_name_is_gone_at_once_and_can_be_loaded_again():
    async def scenario(names, engine, table):
        old = await names.load("a", "one")
        stream = names.holding(old, _outputs(), _accept)
        await names.unload("a")
        assert names.get("a") is None and not table
        again = await names.load("a", "one")
        assert [item async for item in stream] == [0, 1, 2]
        await names.drained()
        assert list(engine.loaded) == [again.key]
        with pytest.raises(KeyError):
            await names.unload("b")

    _run(scenario)


@pytest.mark.parametrize("ending", ["closed", "failed", "refused", "dropped", "never started"])
def test_every_end_of_a_request_releases_its_adapter(ending):
    async def scenario(names, engine, table):
        async def failing():
            yield 0
            raise RuntimeError("engine")

        def refuse(output):
            if output == 1:
                raise RuntimeError("engine")

        version = await names.load("a", "one")
        check = refuse if ending == "refused" else _accept
        stream = names.holding(version, failing() if ending == "failed" else _outputs(), check)
        await names.unload("a")
        assert version.requests == 1 and engine.loaded
        if ending != "never started":
            await anext(stream)
        if ending == "closed":
            await stream.aclose()
        elif ending in ("failed", "refused"):
            with pytest.raises(RuntimeError, match="engine"):
                await anext(stream)
        del stream
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)
        await names.drained()
        assert version.requests == 0 and not engine.loaded

    _run(scenario)


def test_a_failed_load_leaves_the_name_as_it_was():
    async def scenario(names, engine, table):
        version = await names.load("a", "one")
        with pytest.raises(ValueError, match="folder: got bad"):
            await names.load("a", "bad")
        assert names.get("a") is version is table["a"] and list(engine.loaded) == [version.key]
        with pytest.raises(ValueError, match="name: got 'base'"):
            await names.load("base", "one")

    _run(scenario)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a@1", "a b", "x" * 129, "text", 3, None])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match="name: got"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "A-1.b:c_d", "x" * 128, "_"])
def test_names_that_are_accepted(name):
    assert check_name(name) == name
