"""Classifiers that read the mean of the last hidden states, as sentence encoders are trained to
be read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

HEAD = "classifier"  # the submodule's name, which PEFT's modules_to_save is given


class EncoderClassifier(nn.Module):
    """``classifier(mean of the encoder's last hidden states over real tokens)``; the encoder's
    parameters are frozen.

    Args:
        encoder: a transformers model that returns ``last_hidden_state`` ``[B, T, d]``.
        num_labels: outputs of the classifier. seed: of the classifier's first weights.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.config = encoder.config
        self.name_or_path = encoder.name_or_path  # PEFT notes it in an adapter's configuration
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)
        generator = torch.Generator().manual_seed(seed)
        bound = 1.0 / math.sqrt(self.config.hidden_size)
        if self.classifier.weight.is_meta:
            return
        with torch.no_grad():
            self.classifier.weight.uniform_(-bound, bound, generator=generator)
            self.classifier.bias.zero_()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embedding."""
        return self.encoder.get_input_embeddings()

    def can_generate(self) -> bool:
        """No: its labels are classes, not tokens, so the whole sequence is the prompt."""
        return False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, num_labels]`` for token ids and mask ``[B, T]``."""
        return self.classify(
            self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,
            attention_mask,
        )

    def classify(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits for last hidden states ``[B, T, d]``."""
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return self.classifier(pooled.to(self.classifier.weight.dtype))


class MeanPooledClassifier(EncoderClassifier):
    """An :class:`EncoderClassifier` that is called as transformers' sequence classifiers are, and
    gives what they give.

    With one output labels are numbers and the loss is the squared error, else they are class
    numbers and it is cross entropy.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                super().__getattr__("encoder"), name
            )  # device, gradient checkpointing and the like

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Loss (with ``labels [B]``) and logits ``[B, num_labels]`` for token ids or
        ``inputs_embeds``, and mask ``[B, T]``.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        known = {
            name: inputs[name]
            for name in ("inputs_embeds", "token_type_ids")
            if inputs.get(name) is not None
        }
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **known
        ).last_hidden_state
        mask = (
            torch.ones(hidden.shape[:2], device=hidden.device)
            if attention_mask is None
            else attention_mask
        )
        logits = self.classify(hidden, mask)
        loss = None
        if labels is not None and logits.shape[-1] == 1:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
