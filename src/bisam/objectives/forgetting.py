"""OBF: output bias forgetting."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bisam.objectives.objective import OfClasses, of_labels
from bisam.validation import share


@dataclass(frozen=True)
class OBF(OfClasses):
    """Output bias forgetting: (1 - alpha) CE(p, y) - CE(p, uniform), climbed by the adversary (Vani et al., 2024).

    From "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM Dynamics",
    https://arxiv.org/abs/2406.06700. The formula is that of the authors' code (BorealisAI/perturbed-forgetting on
    GitHub, `loss/output_bias_forget.py`); of the paper only the abstract was read. With p the predicted probabilities,

        alpha = gamma max(0, 1 - lam / p_y) / (1 - lam),

    a constant in the gradient, which with respect to the logits is uniform - alpha p - (1 - alpha) onehot(y). Where the
    label has a low probability the logits are moved from the label to all classes alike, whatever the prediction; where
    it has a high one (and gamma is 1) the prediction is moved to the uniform one. Unlike that of cross-entropy the
    gradient of confident correct examples does not vanish. The loss is no bound of the 0-1 loss, and may be negative.

    The authors' script has gamma 1 for SAM and GSAM on ViTs, and 1e-12, which is 0, for ResNets, for ASAM and for
    fine-tuning; lam is 1 over the number of classes; p consists of sigmoids.

    Args:
        gamma: weight of the prediction, in [0, 1].
        lam: probability of the label below which alpha is 0, in [0, 1). Default: 1/K.
        sigmoid: whether p is a sigmoid of each logit and CE the sum of binary cross-entropies over the classes, as in
            the authors' script. Default: the softmax, their other choice.
        ignore_index: label of examples that are ignored.

    Raises:
        TypeError: `gamma` or `lam` is not a number, or `ignore_index` is no int.
        ValueError: `gamma` or `lam` is outside its range.

    Example:
        >>> import torch
        >>> from bisam import OBF, SAM
        >>> OBF()(torch.zeros(1, 4), torch.tensor([0]))    # a uniform prediction: the loss is 0, its gradient is not
        tensor([0.])
        >>> forgetting = SAM(0.1, ascent=OBF())
    """

    gamma: float = 1.0
    lam: float | None = None
    sigmoid: bool = False
    ignore_index: int = field(default=-100, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share("gamma", self.gamma, zero=True)
        if self.lam is not None:
            share("lam", self.lam, zero=True, one=False)

    def _labelled(self, logits: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        ignored, index, _ = of_labels(logits, labels, ignore_index)
        costs = self._costs(logits)
        values = (self._weights(logits) * costs).gather(1, index).squeeze(1) - costs.mean(1)
        return values if ignored is None else values.masked_fill(ignored, 0.0)

    def _expected(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        costs = self._costs(logits)
        return (probabilities * self._weights(logits) * costs).sum(1) - probabilities.sum(1) * costs.mean(1)

    def _costs(self, logits: Tensor) -> Tensor:
        """Returns the cross-entropy for each class as the label; their mean is that for the uniform distribution."""
        if self.sigmoid:  # not softplus, which is linear above 20
            return -F.logsigmoid(-logits).sum(1, keepdim=True) - logits
        return -F.log_softmax(logits, 1)

    @torch.no_grad()
    def _weights(self, logits: Tensor) -> Tensor:
        """Returns 1 - alpha for each class as the label."""
        lam = 1 / logits.shape[1] if self.lam is None else self.lam
        p = logits.sigmoid() if self.sigmoid else logits.softmax(1)
        surplus = 1 - lam / p if lam else torch.ones_like(p)  # not 0 / p, where p has become 0
        return 1 - surplus.clamp_min(0) * (self.gamma / (1 - lam))
