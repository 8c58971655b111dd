"""Mixed precision, quantization, recomputation and compilation train what plain float32 trains,
as near as they can.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from reft_train.config import build
from reft_train.errors import UserError
from reft_train.training.outcome import Outcome
from reft_train.training.session import train

from tests.reft_train import tiny
from tests.reft_train.training.launching import settings


def needs(package: str):
    """Skip, naming the package, where it is not installed."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """A function: settings that differ from a short float32 run's in, its outcome out; each run
    is trained once.
    """
    folder = tmp_path_factory.mktemp("precision")
    known: dict[str, Outcome] = {}

    def outcome(model=tiny_llama, **changes) -> Outcome:
        name = "-".join([model.name, *(f"{key}={value}" for key, value in changes.items())])
        if name not in known:
            output = str(folder / "runs" / name)
            given = settings(
                folder, model, output=output, epochs=1, validation=0, evaluate_every=None, **changes
            )
            known[name] = train(build(given))
        return known[name]

    return outcome


def _losses(outcome: Outcome) -> torch.Tensor:
    return torch.tensor([loss for _, loss in outcome.losses])


def _assert_near(outcome: Outcome, plain: Outcome, unit: float) -> None:
    """Losses within ``unit``, the rounding of the narrower format, relative; one rounding moves
    a loss by less than that.
    """
    torch.testing.assert_close(_losses(outcome), _losses(plain), rtol=unit, atol=0.0)


def test_bf16_trains_as_float32_to_its_rounding(run):
    _assert_near(run(mixed_precision="bf16"), run(), torch.finfo(torch.bfloat16).eps)


def test_bf16_rounds(run):
    assert not torch.equal(_losses(run(mixed_precision="bf16")), _losses(run()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_edits_stay_orthonormal_in_float32(run, mixed_precision, dtype):
    assert run(mixed_precision=mixed_precision, dtype=dtype).orthonormality < 1e-6


def test_fp16_on_a_cpu_is_refused(run):
    with pytest.raises(UserError, match="mixed_precision: got fp16 on a CPU, expected bf16 or no"):
        run(mixed_precision="fp16")


def test_recomputing_layers_changes_no_loss(run):
    torch.testing.assert_close(_losses(run(gradient_checkpointing=True)), _losses(run()))


def test_spreading_over_devices_changes_nothing_on_one(run):
    assert torch.equal(_losses(run(device_map="auto")), _losses(run()))


@pytest.mark.full
def test_compiling_changes_no_loss(run):
    torch.testing.assert_close(_losses(run(compile=True)), _losses(run()))


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path, tiny_llama
):
    given = settings(tmp_path, tiny_llama, output=str(tmp_path / "run"), deepspeed="zero2.json")
    with pytest.raises(
        UserError, match="deepspeed: got zero2.json, but deepspeed is not installed, expected none"
    ):
        train(build(given))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A Llama whose layers are whole blocks of 64, as 4-bit formats ask."""
    return tiny.save_llama(
        tmp_path_factory.mktemp("wide-llama"), hidden_size=64, intermediate_size=128
    )


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantized_model_trains_near_the_float32_one(run, wide_llama, kind):
    plain, quantized = run(wide_llama), run(wide_llama, quantization=kind)
    assert _losses(quantized)[-1] < _losses(quantized)[0]
    assert quantized.orthonormality < 1e-6
    assert quantized.trainable == plain.trainable


@pytest.mark.gpu
@needs("liger_kernel")
def test_liger_kernels_change_no_loss(run):
    if not torch.cuda.is_available():
        pytest.skip("Liger kernels need a GPU")
    plain = run(device="cuda", dtype="float32")
    torch.testing.assert_close(
        _losses(run(device="cuda", dtype="float32", liger=True)), _losses(plain)
    )


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_kernels_that_are_not_installed_are_refused(run):
    with pytest.raises(
        UserError, match="liger: got true, but liger-kernel is not installed, expected false"
    ):
        run(liger=True)
