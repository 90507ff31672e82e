"""Generation in fewer round trips: guess some tokens here, and have the owner's trunk look at all of them in one pass.

A plain generated token costs one round trip. Here a small *draft* model, which the data holder has anyway, writes a few
tokens; all of them cross in one request behind what the trunk's cache holds; the top then says of each whether the
tuned model would have written it. The first wrong one is replaced, and what came after it is cut off both caches: the
next request's `past` says so to the owner, as for any method that takes tokens back.

The schedule is the library's assisted generation, which works on the party's model as it is:

- greedy: a guess stays if it is the likeliest token, so the text is that of plain greedy generation. Kernels may round
  otherwise for several positions than for one, so two tokens that are equally likely within rounding can change places.
- sampling: a guess x stays with probability min(1, p(x) / q(x)), p of the tuned model and q of the draft; in place of
  the first that does not, a token is drawn from max(p - q, 0), scaled to 1. Whatever is written is then distributed as
  p says (Leviathan, Kalman and Matias 2023, algorithm 1 and appendix A.1; Chen et al. 2023, theorem 1). The draws are
  others than without guesses, so the same seed writes another text.

Every guess crosses, wrong ones too: they are made of the text so far, and show the owner what the draft expected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from party.model import check_device, resolve_dtype
from party.opening import say
from party.remote import RemoteTrunk
from splitfl.config import TuneSettings
from splitfl.emulator import Emulator, check_belongs, open_emulator
from splitfl.errors import ModelError, UsageError
from splitfl.kit import DTYPES, Kit
from splitfl.load import load_config, parameter_count, quiet_library
from splitfl.report import as_size

OWN_EMULATOR = "emulator"
"""Folder of a run in which an emulator is looked for."""


@dataclass
class Passes:
    """What one generation asked the trunk for."""

    passes: int = 0
    """Requests, and so round trips."""
    positions: int = 0
    """Tokens whose hidden state crossed, the prompt's too, of all rows together."""

    def gained(self, new: int) -> int:
        """Guesses that stayed, of `new` tokens written: what there is beyond one token for each pass."""
        return max(new - self.passes, 0)

    def guessed(self, prompt: int) -> int:
        """Guesses that crossed, behind a prompt of so many tokens."""
        return max(self.positions - prompt - (self.passes - 1), 0) if self.passes else 0


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Passes]:
    """Count what goes through a party model's remote trunk meanwhile; nothing where it has none."""
    found = Passes()

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.passes += 1
        found.positions += hidden.shape[0] * hidden.shape[1]

    remote = [module for module in model.modules() if isinstance(module, RemoteTrunk)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in remote]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def open_draft(
    how: str, settings: TuneSettings, kit: Kit, model: PreTrainedModel, *, directory: Path | None, emulator: Path
) -> PreTrainedModel:
    """The model that guesses, frozen, with the weights of bottom and top that `model` has in memory already.

    Args:
        how: ``emulator``, ``ends`` or ``model``.
        settings: of the run.
        kit: the run's.
        model: the party's model, before an adapter is put on it.
        directory: of the draft model, for ``model``.
        emulator: directory of one, for ``emulator``.

    Raises:
        UsageError: another vocabulary.
        ModelError: no emulator, or one for another kit; a directory that holds no model.
    """
    dtype = DTYPES[resolve_dtype(kit, settings.dtype)]
    if how == "model":
        assert directory is not None  # noqa: S101  the settings saw to it
        draft = _other_model(directory, kit, dtype)
    elif how == "emulator":
        draft = _emulator(kit, emulator).load(kit, dtype)
    else:
        draft = kit.load(dtype)
    if how != "model":
        draft.name_or_path = str(kit.path)  # not a temporary folder: PEFT looks there for a config file
    check_vocabulary(draft, model)
    draft = draft.to(check_device(settings.device)).requires_grad_(False).eval()
    draft.config.use_cache = True
    shared = share_weights(draft, model)
    own = parameter_count(draft) - sum(p.numel() for p in shared)
    say(f"guesses come from {how}: {own:,} parameters of its own, {as_size(own * dtype.itemsize)}")
    return draft


def _emulator(kit: Kit, folder: Path) -> Emulator:
    if not folder.is_dir():
        raise ModelError(
            f"--draft emulator needs an emulator, and {folder} is none.",
            hint="name one with --emulator, fetch one with `splitfl fetch`, or use --draft ends",
        )
    emulator = open_emulator(folder)
    check_belongs(emulator.plan, kit)
    return emulator


def _other_model(directory: Path, kit: Kit, dtype: Any) -> PreTrainedModel:
    config = load_config(directory)
    check_tokenizer(directory, kit.tokenizer())
    try:
        with quiet_library():
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The draft model {directory} could not be loaded: {error}") from error
    return loaded


def check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a draft model whose tokens mean something else; one that comes without a tokenizer is taken at its word.

    Raises:
        UsageError: its vocabulary is another one.
    """
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        return
    theirs = type(tokenizer).from_pretrained(directory, local_files_only=True).get_vocab()
    if theirs != tokenizer.get_vocab():
        raise UsageError(
            f"The draft model {directory} has another vocabulary than the tuned model: its tokens mean other words.",
            expected="a model with the very same tokenizer",
            hint="use --draft emulator or --draft ends",
        )


def check_vocabulary(draft: PreTrainedModel, model: PreTrainedModel) -> None:
    """Refuse a draft that gives a number to more or fewer tokens.

    Raises:
        UsageError: it does.
    """
    sizes = [int(each.config.get_text_config().vocab_size) for each in (draft, model)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"The draft model has a vocabulary of {sizes[0]} tokens, the tuned model one of {sizes[1]}.",
            expected="the same vocabulary, token by token",
            hint="use --draft emulator or --draft ends",
        )


def share_weights(draft: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    """Let `draft` use the tensors of `model` wherever both hold the same ones under one name; which those are."""
    held = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}
    for path, module in draft.named_modules(remove_duplicate=False):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            twin = held.get(f"{path}.{name}" if path else name)
            if twin is not None and twin.dtype == parameter.dtype and twin.equal(parameter):
                setattr(module, name, twin)
                shared[id(twin)] = twin
    return list(shared.values())


def drafting(draft: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Keyword arguments for `generate()` of the party's model, by which `draft` guesses `tokens` tokens for each pass.

    One row at a time; whatever else `generate()` is given holds for the guesses as well.
    """
    config = draft.generation_config
    assert config is not None  # noqa: S101  a causal language model has one
    config.num_assistant_tokens = tokens
    # A round trip costs the same for few guesses as for many, so neither doubts nor failures make them fewer.
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    return {"assistant_model": draft}
