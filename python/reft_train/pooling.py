"""Classifiers that use the mean of the last hidden states, as in sentence encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = "classifier"  # submodule name passed to PEFT's modules_to_save


class MeanPooledClassifier(nn.Module):
    """Linear classifier on the mean of a frozen encoder's last hidden states over real tokens.

    Inputs and outputs match transformers' sequence classifiers. With one output the labels are real
    numbers and the loss is the squared error; otherwise classes and cross entropy.

    Args:
        encoder: a transformers model that returns ``last_hidden_state`` ``[B, T, d]``.
        num_labels: number of outputs.
        seed: seed of the classifier's initial weights.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.config = encoder.config
        self.name_or_path = encoder.name_or_path  # PEFT stores it in the adapter's configuration
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)
        bound = self.config.hidden_size**-0.5
        if not self.classifier.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            nn.init.uniform_(self.classifier.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.classifier.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # forwards device, gradient checkpointing and other attributes
            return getattr(super().__getattr__("encoder"), name)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding."""
        return self.encoder.get_input_embeddings()

    def can_generate(self) -> bool:
        """Return False: labels are classes, so the whole sequence is the prompt."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Compute logits ``[B, num_labels]``, and the loss if ``labels [B]`` is given."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        known = ("inputs_embeds", "token_type_ids")
        options = {name: inputs[name] for name in known if inputs.get(name) is not None}
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = output.last_hidden_state
        mask = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        logits, loss = self.classifier(pooled.to(self.classifier.weight.dtype)), None
        if labels is not None and logits.shape[-1] == 1:
            loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
