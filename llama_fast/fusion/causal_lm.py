"""The language model whose training loss is fused with its head."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .layers import is_plain_linear
from .neighbours import ForCausalLMLoss, can_return_tuple, causal_lm_output, with_any_cache_name
from .swap import Fused


class FusedCausalLM(Fused):
    """A language model whose training loss is computed from the hidden states: the logits are never there as a whole.

    So in training mode with `labels` the output's `logits` is None. Without labels, in `eval()` mode, with
    `logits_to_keep`, with a loss function of one's own, or with a head that is no plain nn.Linear when it is called, the
    model's own forward runs, and gives logits.
    """

    cache_name: ClassVar[str]  # how its own forward spells the cache

    @can_return_tuple
    @with_any_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{self.cache_name: cache},
            **kwargs,
        )
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None or not self.training or not keeps_all or not self._has_plain_loss():
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        outputs = self.base_model(**inputs)
        return causal_lm_output(self._loss(outputs.last_hidden_state, labels, **kwargs), outputs)

    def _has_plain_loss(self) -> bool:
        return self.loss_function is ForCausalLMLoss and is_plain_linear(self.get_output_embeddings())

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """transformers' ForCausalLMLoss of the head's logits: over `num_items_in_batch` labels if it is given (all those
        of an accumulated batch), else over the labels here that are not ignored."""
        head = self.get_output_embeddings()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = ops.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            shift_labels.reshape(-1).to(hidden.device),
            bias=head.bias,
            ignore_index=ignore_index,
            softcap=getattr(self.config, "final_logit_softcapping", None),
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
