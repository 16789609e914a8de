"""Text from a model, token by token."""

from __future__ import annotations

import torch

from ebwm_dist.registry import Model


def generate(
    model: Model, prompt: list[int], *, num_tokens: int, num_steps: int, temperature: float, max_context: int, seed: int
) -> list[int]:
    """Return `num_tokens` tokens sampled after `prompt`, each refined for `num_steps` MCMC steps.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        max_context: number of most recent tokens the model looks at.
        seed: of the sampling; the same call gives the same tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(prompt)
    for position in range(num_tokens):
        context = torch.tensor([tokens[-max_context:]], device=device)
        # Noise that a prediction may start from is drawn anew for every token.
        sample_ids = torch.tensor([position])
        logits = model.next_token_logits(context, num_steps, sample_ids)[0].float()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probabilities = (logits / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :]
