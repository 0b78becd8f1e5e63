"""Rows of ``benchmarks.quantization`` for other tools: NNI 3.0, torchao 0.18 and NNCF 3.4, each where it is installed.

NNI gets the targets that Tersor's rows get: weights of all convolutions and linear layers, a scale for each output
channel, and their inputs, one scale and zero point; the first and the last layer have 8 bits. torchao and NNCF decide
themselves what they quantize; NNCF's network is what OpenVINO computes with its int8 kernels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quantization_rows import Bits, Classify, Method, Task, norms, optimizer_of, schedule_of


def nni(name: str, bits: Bits, *, trains: bool, fused: bool = False, scheme: str = "affine", **options: Any) -> Method:
    """A row for a quantizer of NNI.

    Args:
        name: of the class.
        bits: of the layers between the first and the last.
        trains: as `Method` has it.
        fused: give it convolutions with their norms as ``fuse_names``.
        scheme: the ``quant_scheme`` of the inputs.
        **options: of the quantizer.
    """

    def quantize(task: Task) -> Classify:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nni.compression import quantization
        logging.disable(logging.CRITICAL)
        model = task.copy()
        config_list = _nni_config_list(name, task, bits, scheme, fused)
        quantizer = getattr(quantization, name)(model, config_list, _nni_evaluator(model, task), **options)
        if trains:
            quantizer.compress(task.steps, None)
        else:
            with torch.no_grad():  # it insists on a training function; this one does nothing
                quantizer.compress(1, None)
        return model.eval()

    says = f"nni {name}" + "".join(f", {key}={value!r}" for key, value in options.items())
    says += ", convolutions fused with their norms" if fused else ""
    says += "; scales for whole tensors, as it takes no granularity" if name in _WHOLE else ""
    return Method(quantize, says, bits, trains=trains)


_WHOLE = ("DoReFaQuantizer", "BNNQuantizer")


def _nni_config_list(name: str, task: Task, bits: Bits, scheme: str, fused: bool) -> list[dict[str, Any]]:
    """One entry for the layers between, and one each for the first and the last."""
    layers = [key for key, module in task.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    weight_scheme = "affine" if name in ("DoReFaQuantizer", "LsqPlusQuantizer") else "symmetric"

    def entry(names: list[str], weights: int, inputs: int) -> dict[str, Any]:
        signed = scheme == "symmetric" and names == [task.ends[0]]  # as with ours
        weight: dict[str, Any] = {"quant_dtype": f"int{weights}", "quant_scheme": weight_scheme}
        if name not in _WHOLE:
            weight["granularity"] = "out_channel"
        value = {"quant_dtype": f"{'int' if signed else 'uint'}{inputs}", "quant_scheme": scheme}
        settings = {"weight": weight, "_input_": value}
        asked: dict[str, Any] = {"op_names": names, "target_names": [*settings], "target_settings": settings}
        asked["quant_dtype"] = f"int{weights}"  # it insists on one here, and takes those of the settings
        pairs = [pair for pair in norms(task.model) if pair[0] in names] if fused else []
        return {**asked, **({"fuse_names": pairs} if pairs else {})}

    between = [key for key in layers if key not in task.ends]
    if name == "BNNQuantizer":  # it has one bit, and no other
        return [entry(between, bits.weights, bits.activations)]
    return [entry(between, bits.weights, bits.activations), *(entry([name], 8, 8) for name in task.ends)]


def _nni_evaluator(model: nn.Module, task: Task) -> Any:
    """Trains for as many steps as it is told, and looks at the calibration images."""
    import nni as package
    from nni.compression import TorchEvaluator

    def train(
        net: nn.Module, optimizer: Any, step: Callable[..., Tensor], schedule: Any, max_steps: int, _epochs: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        net.train()
        for batch, _ in zip(task.training(), range(max_steps), strict=False):
            optimizer.zero_grad()
            step(batch, net).backward()
            optimizer.step()
            schedule.step()
        net.eval()

    @torch.no_grad()
    def look(net: nn.Module) -> None:
        net.eval()
        for images in task.batches():
            net(images)

    optimizer = package.trace(torch.optim.AdamW)(model.parameters(), lr=task.learning_rate)
    schedule = package.trace(torch.optim.lr_scheduler.OneCycleLR)(
        optimizer, max_lr=task.learning_rate, total_steps=task.steps + 1
    )
    return TorchEvaluator(
        train, optimizer, lambda batch, net: F.cross_entropy(net(batch[0]), batch[1]), schedule, evaluating_func=look
    )


def _nni_rows() -> dict[str, Method]:
    eight, four, two = Bits(8, 8), Bits(4, 4), Bits(2, 2)
    return {
        "NNI 3.0 PTQ": nni("PtqQuantizer", eight, trains=False, fused=True),
        "NNI 3.0 PTQ, bias correction": nni("PtqQuantizer", eight, trains=False, fused=True, is_bias_correction=True),
        "NNI 3.0 PTQ, 4 bits": nni("PtqQuantizer", four, trains=False, fused=True),
        "NNI 3.0 QAT": nni("QATQuantizer", eight, trains=True, fused=True),
        "NNI 3.0 QAT, 4 bits": nni("QATQuantizer", four, trains=True, fused=True),
        "NNI 3.0 LSQ, 4 bits": nni("LsqQuantizer", four, trains=True, scheme="symmetric"),
        "NNI 3.0 LSQ, 2 bits": nni("LsqQuantizer", two, trains=True, scheme="symmetric"),
        "NNI 3.0 LSQ+, 4 bits": nni("LsqPlusQuantizer", four, trains=True),
        "NNI 3.0 DoReFa, 4 bits": nni("DoReFaQuantizer", four, trains=True),
        "NNI 3.0 DoReFa, 2 bits": nni("DoReFaQuantizer", two, trains=True),
        "NNI 3.0 BNN": nni("BNNQuantizer", Bits(1, 1), trains=True),
    }


def torchao(*, trains: bool) -> Method:
    """A row for torchao's quantization of exported programs."""

    def quantize(task: Task) -> Classify:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _torchao(task, trains)

    says = "torchao PT2E, X86InductorQuantizer, its default configuration"
    return Method(quantize, says + (" for QAT" if trains else ""), Bits(8, 8), trains=trains)


def _torchao(task: Task, trains: bool) -> Classify:
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=trains))
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    model = task.copy().train(trains)
    exported = torch.export.export(model, (task.calibration[:4],), dynamic_shapes=dynamic, strict=True).module()
    prepared = (prepare_qat_pt2e if trains else prepare_pt2e)(exported, quantizer)
    if trains:
        move_exported_model_to_train(prepared)
        optimizer = optimizer_of(prepared, task)
        schedule = schedule_of(optimizer, task)
        for images, labels in task.training():
            optimizer.zero_grad()
            F.cross_entropy(prepared(images), labels).backward()
            optimizer.step()
            schedule.step()
        move_exported_model_to_eval(prepared)
    else:
        with torch.no_grad():
            for images in task.batches():
                prepared(images)
    return convert_pt2e(prepared)


def nncf(preset: str) -> Method:
    """A row for NNCF on OpenVINO's representation of the network.

    Args:
        preset: ``"mixed"`` has affine activations, ``"performance"`` symmetric ones.
    """

    def quantize(task: Task) -> Classify:
        import nncf as package
        import openvino

        logging.disable(logging.CRITICAL)
        shape = [-1, *task.calibration.shape[1:]]
        converted = openvino.convert_model(task.copy().eval(), example_input=task.calibration[:4], input=shape)
        quantized = package.quantize(
            converted,
            package.Dataset([images.numpy() for images in task.batches()]),
            preset=package.QuantizationPreset(preset),
            subset_size=len(task.batches()),
        )
        precise = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}  # no bf16 for what stays float
        compiled = openvino.compile_model(quantized, "CPU", precise)
        return lambda images: torch.from_numpy(compiled(images.numpy())[0])

    says = f"nncf.quantize on OpenVINO's representation, preset {preset}, with its fast bias correction; int8 kernels"
    return Method(quantize, says, Bits(8, 8), trains=False)


def _other_rows() -> dict[str, Method]:
    return {
        **({"torchao PTQ": torchao(trains=False)} if find_spec("torchao") else {}),
        **({"NNCF PTQ": nncf("mixed"), "NNCF PTQ, symmetric": nncf("performance")} if find_spec("nncf") else {}),
        **({"torchao QAT": torchao(trains=True)} if find_spec("torchao") else {}),
    }


PEERS: dict[str, Method] = {**_other_rows(), **(_nni_rows() if find_spec("nni") else {})}
"""The rows of the peers that are installed."""
