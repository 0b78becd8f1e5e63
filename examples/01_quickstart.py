"""The main job: a trained network becomes smaller and faster and keeps its accuracy.

It prunes more than half of the channels of all convolutions, fine-tunes, cuts the channels out, saves, loads again,
exports to ONNX, and says what that came to. What it writes is in ``runs/quickstart/``. Run it with ``make quickstart``.
"""

import copy
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from torch import Tensor

import tersor
from mnist import accuracy, build_model, load_data, train, trained_model
from tersor.deploy import export_onnx
from tersor.pruning import L1NormPruner
from tersor.speedup import ModelSpeedup

OUTPUT = Path("runs/quickstart")
CONFIG_LIST = [
    {"op_types": ["Conv2d"], "sparse_ratio": 0.5},
    {"op_types": ["Conv2d"], "op_names_re": ["stage3"], "sparse_ratio": 0.625},  # the last stage can spare more
]


def main() -> None:
    """Take one network all the way."""
    console = Console()
    data = load_data()

    console.rule("A trained network")
    original = trained_model()
    before = accuracy(original, data)
    console.print(f"Accuracy {before:.2%} on the 10,000 test images.")

    console.rule("Prune and fine-tune")
    model = copy.deepcopy(original)
    # What meets in a shortcut must lose the same channels, or none of them could be cut out.
    config_list = tersor.auto_set_dependency_group_ids(model, CONFIG_LIST, data.example_input)
    pruner = L1NormPruner(model, config_list, example_inputs=data.example_input)
    console.print(pruner.plan)
    _, masks = pruner.compress()
    console.print(f"Accuracy {accuracy(model, data):.2%} after pruning. Training ...")
    torch.manual_seed(0)
    train(model, data, epochs=3)  # the loop that trained the original: it need not know of the masks
    console.print(f"Accuracy {accuracy(model, data):.2%} after fine-tuning, still at the old size.")

    console.rule("Cut the channels out")
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, data.example_input, masks)
    small = speedup.speedup_model()
    console.print(f"Masked and small outputs differ by {speedup.report.error:.1e}, relative to the largest.")

    console.rule("Save, load again, export")
    tersor.save(small, OUTPUT / "model")
    small = tersor.load(build_model, OUTPUT / "model").eval()
    after = accuracy(small, data)
    session = onnxruntime.InferenceSession(export_onnx(small, data.example_input, OUTPUT / "model.onnx"))

    def in_onnx_runtime(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])

    console.print(f"Accuracy {after:.2%} as loaded again, {accuracy(in_onnx_runtime, data):.2%} in ONNX Runtime.")

    console.rule("What it came to")
    comparison = tersor.compare(original, small, data.example_input, accuracy=(before, after))
    console.print(comparison)
    console.print("Report:", comparison.report(OUTPUT, title="Quickstart: a residual network on MNIST"))


if __name__ == "__main__":
    main()
