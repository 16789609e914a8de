"""The optimizer's parameter groups, AdamW's or with Muon, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ebwm_dist.config.deepspeed import optimizer_checks
from ebwm_dist.config.schema import Config
from ebwm_dist.models.layers import is_block_matrix
from ebwm_dist.training.muon import MuonAdamW


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return the optimizer with a group for the model and one for a trained alpha, and with Muon one for the matrices.

    Muon's group is the second. `set_lr` scales all learning rates alike, so their ratios survive the decay.
    """
    opt = config.optimizer
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in group_settings(config, 1.0)}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = "matrices" in parts and is_block_matrix(name, vars(p).get("ds_shape", p.shape))
            parts["alpha" if name.endswith("alpha") else "matrices" if matrix else "rest"].append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": parts[role], **settings} for role, settings in group_settings(config, 1.0).items() if parts[role]
    ]
    if optimizer_checks(config):
        return CheckedAdamW(groups, opt.grad_clip, fused=True)
    # DeepSpeed flattens the parameters, so their names would be those of something else.
    nameless = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    return MuonAdamW(nameless, fused=True) if opt.kind == "muon" else torch.optim.AdamW(nameless, fused=True)


def group_settings(config: Config, scale: float) -> dict[str, dict[str, Any]]:
    """Return the settings of every group of parameters, in order, at `scale` times the peak learning rates."""
    opt = config.optimizer
    adamw = {"betas": (opt.betas[0], opt.betas[1]), "eps": opt.eps}
    groups = {"rest": {"lr": opt.lr * scale, "weight_decay": opt.weight_decay, **adamw}}
    if opt.kind == "muon":
        lr = opt.lr if opt.muon_lr is None else opt.muon_lr
        groups["matrices"] = {"lr": lr * scale, "weight_decay": opt.weight_decay, "momentum": opt.muon_momentum}
    lr = opt.lr * step_size_lr_multiplier(config)
    return groups | {"alpha": {"lr": lr * scale, "weight_decay": 0.0, **adamw}}


def step_size_lr_multiplier(config: Config) -> float:
    """Return alpha's learning rate as a multiple of the model's; unset, the published 3 x initial alpha."""
    multiplier = config.mcmc.step_size_lr_multiplier
    return 3 * config.mcmc.initial_step_size if multiplier is None else multiplier


class CheckedAdamW(MuonAdamW):
    """AdamW or Muon that clips to `max_norm` and leaves everything as it was when the gradient is not finite.

    Of parameters in bf16 it keeps and updates copies in fp32, and it has their gradients added up in fp32. It reports
    through `overflow` and `_global_grad_norm`, which the engine reads from any optimizer. Its state holds the names of
    the parameters, which come with them in `groups`.
    """

    def __init__(self, groups: list[dict[str, Any]], max_norm: float, **settings: Any):
        self.max_norm, self.overflow, self._global_grad_norm = max_norm, False, 0.0
        self.weights = [p for group in groups for _, p in group["params"]]
        for weight in self.weights:
            weight.grad_dtype = torch.float32
        masters = [{**group, "params": [(name, _master(p)) for name, p in group["params"]]} for group in groups]
        super().__init__(masters, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from gradients that all ranks hold alike, so all decide alike."""
        pairs = [(p, master) for p, master in self._pairs() if p.grad is not None]
        gradients = [p.grad for p, _ in pairs]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        for p, master in pairs:
            master.grad = p.grad
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_([master for _, master in pairs], self.max_norm, norm)
        super().step(closure)
        self.round_weights()
        for p, master in pairs:
            if p is not master:
                master.grad = None

    @torch.no_grad()
    def round_weights(self) -> None:
        """Make the weights in bf16 from the copies in fp32."""
        for p, master in self._pairs():
            if p is not master:
                p.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return moments, settings and the fp32 copies."""
        return {**super().state_dict(), "masters": [master.detach() for _, master in self._copies()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` has returned."""
        super().load_state_dict(state_dict)
        for (_, master), saved in zip(self._copies(), state_dict["masters"], strict=True):
            master.copy_(saved)

    def _pairs(self) -> list[tuple[Any, nn.Parameter]]:
        """Return the parameters, each with what is updated in its place: itself, or its copy in fp32."""
        masters = [p for group in self.param_groups for p in group["params"]]
        return list(zip(self.weights, masters, strict=True))

    def _copies(self) -> list[tuple[Any, nn.Parameter]]:
        return [(p, master) for p, master in self._pairs() if p is not master]


def _master(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    return weight if weight.dtype == torch.float32 else torch.nn.Parameter(weight.detach().float())


def set_lr(optimizer: torch.optim.Optimizer, config: Config, step: int) -> float:
    """Set every group's learning rate for optimizer step `step`, counted from 1; return the model's.

    The other settings are taken from the configuration again as well: a resume brings the groups of the checkpoint.
    """
    scale = lr_scale(config, step)
    for group, settings in zip(optimizer.param_groups, group_settings(config, scale).values(), strict=False):
        group.update(settings)
    return config.optimizer.lr * scale


def lr_scale(config: Config, step: int) -> float:
    """Return the learning rate of `step`, counted from 1, as a fraction of the peak."""
    opt, warmup, max_steps = config.optimizer, config.warmup_steps, config.training.max_steps
    if step <= warmup:
        return step / warmup
    if opt.schedule == "wsd":
        length = max_steps // 10 if opt.decay_steps is None else opt.decay_steps
        progress = (step - (max_steps - length)) / max(1, length)
        shape = 1 - min(1.0, max(0.0, progress))
    else:
        end = max_steps if opt.decay_steps is None else opt.decay_steps
        progress = (step - warmup) / max(1, end - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return opt.final_lr_ratio + (1 - opt.final_lr_ratio) * shape
