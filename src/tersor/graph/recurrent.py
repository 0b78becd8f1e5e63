"""Recurrent layers that a backend computes in one operator; elsewhere they are steps of ordinary operators."""

from __future__ import annotations

from torch import Tensor

from tersor.graph.rules import Call, Labels, meet, rule

STATE = "meets a state that no parameter controls"


@rule("mkldnn_rnn_layer")
def one_layer(call: Call) -> list[Labels]:
    """One layer in one direction: ``gates = W_ih x + b_ih + W_hh h + b_hh``, each gate as wide as the state.

    A unit of the state lives and dies with its row in every gate and with its column of ``W_hh``.
    """
    x: Tensor = call.arguments["input"]
    w_ih, w_hh = call.labels("weight0"), call.labels("weight1")
    width = call.arguments["hidden_size"]
    inputs = call.labels("input")
    meet(call, [inputs.get(x.dim() - 1), w_ih.get(1)], x.shape[-1], "enters a recurrent layer uncontrolled")
    call.reads(w_ih.get(1))
    call.freeze({dim: vector for dim, vector in inputs.items() if dim != x.dim() - 1}, "a recurrent layer runs over it")
    rows = meet(call, [w_ih.get(0), w_hh.get(0), call.labels("weight2").get(0), call.labels("weight3").get(0)],
                call.arguments["weight0"].shape[0], STATE)  # fmt: skip
    results = [tensor for tensor in call.result if isinstance(tensor, Tensor)]
    if rows is None:
        return [{} for _ in results]
    call.writes(w_ih.get(0))
    call.writes(w_hh.get(0))
    units = call.ledger.tie(rows.reshape(-1, width), [0]).reshape(-1)
    call.reads(w_hh.get(1))
    states = [call.labels(name).get(call.arguments[name].dim() - 1) for name in ("hx_", "cx_")]
    meet(call, [units, w_hh.get(1), *states], width, STATE)
    return [{tensor.dim() - 1: units} if number < 3 else {} for number, tensor in enumerate(results)]
