"""Linear probe: only a head is trained, on graph embeddings of the frozen backbone."""

from __future__ import annotations

from pt_graph.method import GraphConfig, ReadOnceMethod


class LinearProbeConfig(GraphConfig):
    """Settings of the linear probe."""


class LinearProbe(ReadOnceMethod):
    """Linear probe (head only): the head of the prompting methods, trained by the same protocol without a prompt.

    Graphs -> graph embeddings [B, d] -> logits [B, C]. Every graph is embedded once, before the first step, and steps
    cost the head alone; the result is that of running the backbone in every step. With `backbone_dropout` it is run in
    every step.

    Parameters: (L - 1)(d^2 + d) + dC + C with L head layers. Chem GIN, d = 300, 12 tasks, L = 1: 3,612.

    Fidelity: the baseline "head only" of the field has as many layers as the head of the compared prompt (1 to 3 in GPF);
    with more than one layer it is no longer linear, and keeps its name. BatchNorm stays in eval, where scripts that call
    model.train() move its statistics.

    Reference: Alain, Bengio. Understanding intermediate layers using linear classifier probes. ICLR 2017 workshop. For
    graphs: Fang et al. Universal Prompt Tuning for Graph Neural Networks. NeurIPS 2023 (heads).
    """

    name = "linear-probe"
    config_class = LinearProbeConfig
