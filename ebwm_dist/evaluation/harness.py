"""A model for lm-evaluation-harness (the extra `lm-eval`):

from lm_eval import simple_evaluate
from ebwm_dist.evaluation.harness import HarnessModel

simple_evaluate(model=HarnessModel("runs/mine"), tasks=["lambada_openai"])
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ebwm_dist.devices import default_device
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.multiple_choice import score
from ebwm_dist.inference.api import AS_TRAINED, Predictor
from ebwm_dist.inference.settings import Sampling, Thinking
from ebwm_dist.run import Run


class HarnessModel(LM):
    """A model for the harness: tokens are predicted with `thinking` and scored by their likelihood.

    Args:
        path: of a run, as `Run` opens it.
        thinking: how to predict.
        batch_size: number of texts in a batch.
    """

    def __init__(self, path: str | Path, thinking: Thinking = AS_TRAINED, batch_size: int = 16):
        super().__init__()
        self.thinking, self.batch_size = thinking, batch_size
        run = Run(path, default_device())
        if run.tokenizer is None:
            raise UserError(f"{path} has no tokenizer: the harness needs a model of text")
        self.tokenizer = run.tokenizer
        self.predictor = Predictor(run.model, run.config, run.tokenizer)
        self.max_length = self.predictor.max_context

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether it is the greedy one."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            # Pieces of words begin with their space, so one at the end of a context belongs to what follows.
            before = context.rstrip()
            following = self.tokenizer.encode(context[len(before) :] + continuation, follows=before != "")
            pairs.append((self._context(before), following))
        longest = max(len(following) for _, following in pairs)
        if longest > self.max_length:
            raise UserError(
                f"a continuation of {longest} tokens: the model was trained with a context of {self.max_length}; "
                "leave this task out"
            )
        scores = score(self.predictor, pairs, self.thinking, self.batch_size)
        return [(found.log_likelihood, found.greedy) for found in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in the harness' windows of the model's length."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.tokenizer.eos_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, score(self.predictor, pairs, self.thinking, self.batch_size), strict=True):
            totals[owner] += found.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to its first stop string; contexts that are too long slide."""
        texts: list[str] = []
        for settings, alike in groupby(requests, key=lambda request: request.args[1]):
            prompts = [self._context(request.args[0]) for request in alike]
            wanted = normalize_gen_kwargs(settings)
            sampling = Sampling(
                wanted.get("temperature", 0.0), *(wanted.get(name) or None for name in ("top_k", "top_p", "min_p"))
            )
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                seeds = range(len(texts), len(texts) + len(batch))
                found = self.predictor.generate(
                    batch,
                    wanted["max_gen_toks"],
                    thinking=self.thinking,
                    sampling=sampling,
                    stop=wanted["until"],
                    seeds=seeds,
                    slide=True,
                )
                texts += [continuation.text for continuation in found]
        return texts

    def _context(self, text: str) -> list[int]:
        """Return the tokens of a context; an empty one is the end of another text."""
        return self.tokenizer.encode(text) or [self.tokenizer.eos_id]
