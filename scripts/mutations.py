"""Break the package in one place after the other, and see that `make test` notices each.

    python scripts/mutations.py            # a table: what was broken, and the first test that failed
    python scripts/mutations.py mapping

Works in a copy. Each mutation names the test files that are run, with the selection of `make test`; a mutation that no
test of them notices ends the program with 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "benchmarks", "docs", "examples", "scripts", "pyproject.toml", "README.md", "Makefile")


@dataclass(frozen=True)
class Mutation:
    """One mistake: text of one file that is replaced, and the tests that should notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = (
    Mutation(
        "superposition: soft labels know the first class alone",
        "synthesis/superposition.py",
        "target.scatter_add_(1, label, weight)",
        "target.scatter_add_(1, label[:, :1], torch.ones_like(weight[:, :1]))",
        "test_superposition.py",
    ),
    Mutation(
        "superposition: latents are not mixed",
        "synthesis/superposition.py",
        'torch.einsum("bkl,bk->bl", latent, weight)',
        "latent[:, 0]",
        "test_superposition.py test_synthesizer.py",
    ),
    Mutation(
        "mapping: latents pass as they are",
        "synthesis/synthesizer.py",
        "if spec.disentanglement_mapping:",
        "if False:",
        "test_embeddings.py test_synthesizer.py",
    ),
    Mutation(
        "extracted embeddings: random instead of the classifier's rows",
        "synthesis/embeddings.py",
        "start = classifier_weight.detach().clone()",
        "start = torch.randn(classifier_weight.shape, generator=generator)",
        "test_embeddings.py test_synthesizer.py",
    ),
    Mutation(
        "batch-norm statistics: variances left out",
        "synthesis/losses.py",
        "gap = (mean - tap.mean).square() + (safe_sqrt(var) - safe_sqrt(tap.var)).square()",
        "gap = (mean - tap.mean).square()",
        "test_losses.py",
    ),
    Mutation(
        "batch-norm statistics as published: variances left out",
        "synthesis/losses.py",
        "F.mse_loss(mean, tap.mean) + F.mse_loss(var, tap.var)",
        "F.mse_loss(mean, tap.mean)",
        "test_losses.py",
    ),
    Mutation(
        "rounding: down instead of to the nearest",
        "quantization/fake_quantize.py",
        "steps.round_()",
        "steps.floor_()",
        "test_fake_quantize.py",
    ),
    Mutation(
        "rounding: errors are not handed on",
        "student/rounding.py",
        "left[:, :, index:] -= error[:, :, None] * hand_on[:, None, index, index:]",
        "pass",
        "test_rounding.py",
    ),
    Mutation(
        "rounding: straight-through gradient passes where it is clamped",
        "quantization/fake_quantize.py",
        "aten.hardtanh_backward(dy, x, (low - 0.5) * step, (high + 0.5) * step)",
        "dy.clone()",
        "test_fake_quantize.py",
    ),
    Mutation(
        "kernels of microcontrollers: negative sums are rounded half up",
        "student/int8_kernels.py",
        "return torch.where(high >= 0, high + half >> shift, -(half - high >> shift))",
        "return high + half >> shift",
        "test_int8_kernels.py test_exact_int8.py",
    ),
    Mutation(
        "ONNX: narrow grids are not clipped",
        "export/onnx_model.py",
        "return op.Clip(levels, _constant(quant_min, np.uint8), _constant(quant_max, np.uint8))",
        "return levels",
        "test_onnx.py test_verification.py test_export_command.py",
    ),
    Mutation(
        "ONNX: the clip of an activation is lost",
        "export/integer_graph.py",
        "_tighten_(graph, use.node, *limits)",
        "pass",
        "test_onnx.py test_verification.py test_export_command.py",
    ),
    Mutation(
        "program for OpenVINO and Inductor: narrow grids are not clipped",
        "export/program.py",
        "_clip_to_grids_(module.graph)\n    _freeze_(module)",
        "_freeze_(module)",
        "test_program.py",
    ),
    Mutation(
        "resume: the optimizer starts anew",
        "training/distillation.py",
        'self._optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "test_distillation.py test_interruption.py",
    ),
    Mutation(
        "resume: random numbers start anew",
        "training/distillation.py",
        'self.rng.set_state(state["generator"])',
        "pass",
        "test_distillation.py test_interruption.py",
    ),
    Mutation(
        "resume: the generator's optimizer starts anew",
        "synthesis/synthesizer.py",
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "test_synthesizer.py test_distillation.py test_interruption.py",
    ),
    Mutation(
        "resume: optimised images start anew",
        "synthesis/direct.py",
        "scale.copy_(kept)",
        "pass",
        "test_direct.py test_interruption.py",
    ),
)


def main() -> None:
    """Break each that was asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="mutations whose name contains one of them; all if none is given")
    words = parser.parse_args().words
    chosen = [each for each in MUTATIONS if not words or any(word in each.name for word in words)]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy / name)
        for mutation in chosen:
            found = _first_failure(copy, mutation)
            unnoticed += not found
            print(f"{mutation.name}\n    {found or 'NOT NOTICED'}", flush=True)
    sys.exit(bool(unnoticed))


def _first_failure(copy: Path, mutation: Mutation) -> str:
    """Return the first test that fails in the broken copy, which is mended again; empty if none does."""
    path = copy / "src/qimera" / mutation.file
    text = path.read_text()
    if text.count(mutation.right) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} holds {text.count(mutation.right)} times {mutation.right!r}"
        )
    path.write_text(text.replace(mutation.right, mutation.wrong))
    tests = [str(next((copy / "tests").rglob(name))) for name in mutation.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(text)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else ""


if __name__ == "__main__":
    main()
