"""`python -m benchmarks kernels | compress | recovery | compare | synthesis | …`; each takes `--help`."""

import importlib
import importlib.util
import sys

COMMANDS = {
    "kernels": "each op x implementation x shape, against eager and torch.compile(eager)",
    "compress": "dcvit.compress on the embedded model, with and without the kernels",
    "recovery": "how well methods recover: method x test bed x budget x seeds, with time and memory",
    "compare": "methods on the same images at the same budget, and ablations, on test beds or ImageNet",
    "synthesis": "how well proxy sets rank the blocks, and what they cost",
    "export": "onnxruntime against PyTorch, for the original and the compressed model",
    "fuse": "the compressed model as returned and after dcvit.fuse",
    "kills": "runs that are killed at random and resume: same weights in the end, no finished work done twice",
    "scaling": "time of large models on many devices, computed from rates measured here",
    "gpu-static": "registers, spills and memory accesses of the compiled GPU kernels, without a GPU",
}


def main(argv: list[str]) -> int:
    """Run the command that the first argument names.

    Returns:
        The exit code: 2 for a missing, unknown or unavailable command.
    """
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:12} {text}" for name, text in COMMANDS.items()]
        print("\n".join(["usage: python -m benchmarks COMMAND [--help]", "", *lines]))
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    module = f"benchmarks.{argv[0].replace('-', '_')}"
    if importlib.util.find_spec(module) is None:
        print(f"{module} is not part of this checkout.", file=sys.stderr)
        return 2
    code: int = importlib.import_module(module).main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
