"""CLIP zero-shot: class names in a sentence, or in several (Radford et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from pt_vl.method import VLConfig, VLMethod


class ZeroShotConfig(VLConfig):
    """Settings of zero-shot classification; `pt_vl.data.TEMPLATES` has the field's templates by data set."""


class ZeroShot(VLMethod):
    """Zero-shot classification: logits exp(s) norm(f) norm(w_c)^T with w_c = text("a photo of a <name>.").

    Pixels [B, 3, H, W] -> logits [B, C]. Of several templates each feature is normalised, their average is normalised again.

    Parameters: none. Nothing is trained; `fit` only evaluates.

    Fidelity: as CLIP's released notebooks; templates of the CoOp code, which writes underscores as spaces. The ensembles are
    built anew for each method (in that code the list is a class attribute, which grows when it is built twice). Of CLIP's
    templates for ImageNet the seven selected ones are built in (`TEMPLATES["ensemble"]`), the full eighty are not; nor is the
    data set's own template appended to an ensemble, as that code does for other data sets than ImageNet. Both are given by
    `templates=(...)`, the latter as `TEMPLATES["ensemble"] + TEMPLATES["pets"]`.

    Reference: Radford et al. Learning Transferable Visual Models From Natural Language Supervision. ICML 2021.
    """

    name = "zero-shot"
    config_class = ZeroShotConfig
    trains: ClassVar[bool] = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []
