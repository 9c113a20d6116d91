"""Packing: many groups `[prompt | y_1 | … | y_K]` in one row of tokens without padding, under a token budget.

    row:        p p p p a a a b b │ q q c c c d │ …          two tries; a, b share the prompt p
    positions:  0 1 2 3 4 5 6 4 5 │ 0 1 2 3 4 2 │ …          they restart after the prompt for every response

Groups whose prompts begin alike stand in the same row and share that beginning, too (`trie.py`).

Shapes: T tokens of the row, R response tokens in it, E responses' tokens counted for each response, C completions.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup
from prefsel.models.trie import MIN_SHARED, Key, Segment, SequencePath, TokenSequence, common_length, lay_out


@dataclass(frozen=True)
class PackedBatch:
    """One row of packed tries, and where its outputs are."""

    input_ids_T: Tensor
    """Token ids, int64."""
    position_ids_T: Tensor
    """Position of each token in its own sequences (prompt + one response), int64."""
    segments: tuple[Segment, ...]
    """What attends to what."""
    rows_R: Tensor
    """The hidden row that predicts each response token: the token before it, the prompt's last for the first."""
    targets_R: Tensor
    """The response tokens themselves, int64; one that several responses share is there once."""
    token_E: Tensor
    """Response after response its tokens, as places in R."""
    completion_E: Tensor
    """Which completion each of them belongs to, 0 … C−1."""
    paths: tuple[SequencePath, ...]
    """For each of the C outputs: where its sequence lies."""
    repeated_prompt_tokens: int
    """Prompt tokens of groups that did not fit into one row, counted for all their rows but the first."""
    shared_tokens: int
    """Tokens of the row's groups that are not there because others hold them: other groups, or other responses."""

    @property
    def completion_index(self) -> list[Key]:
        """For each of the C outputs: (position of its group in the packed sequence of groups, completion in it)."""
        return [path.key for path in self.paths]

    @property
    def trunk_tokens(self) -> int:
        """T: tokens that pass the trunk."""
        return len(self.input_ids_T)

    @property
    def head_rows(self) -> int:
        """R: rows that pass the head of a language model."""
        return len(self.targets_R)

    @property
    def padding_tokens(self) -> int:
        """None, ever; padded batches have some."""
        return 0

    @property
    def num_completions(self) -> int:
        """C."""
        return len(self.paths)

    def sums(self, values_R: Tensor) -> Tensor:
        """Sums over each completion's response tokens, [C] float64, with gradient if enabled."""
        zeros_C = torch.zeros(self.num_completions, dtype=torch.float64, device=values_R.device)
        token_E, completion_E = self.token_E.to(values_R.device), self.completion_E.to(values_R.device)
        return zeros_C.index_add(0, completion_E, values_R.double().index_select(0, token_E))

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`; a GPU takes them from pinned memory, while the host goes on."""
        names = ("input_ids_T", "position_ids_T", "rows_R", "targets_R", "token_E", "completion_E")
        is_pinned = torch.device(device).type == "cuda"
        tensors = {name: getattr(self, name) for name in names}
        moved = {
            name: (tensor.pin_memory() if is_pinned and not tensor.is_cuda else tensor).to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a model follow from."""

    trunk_parameters: int
    """t: weights of the linear layers below the head, embeddings apart."""
    head_parameters: int
    """h: vocabulary × hidden size; 0 for a reward model."""
    num_layers: int
    """L."""
    attention_width: int
    """d: heads × head size."""

    def flops(self, *, trunk_tokens: float, head_rows: float, attention_area: float) -> float:
        """Floating-point operations of a forward pass; `attention_area` counts query-key pairs per head."""
        attention = 4.0 * self.attention_width * self.num_layers * attention_area
        return 2.0 * self.trunk_parameters * trunk_tokens + 2.0 * self.head_parameters * head_rows + attention


def flops_min(groups: Sequence[EncodedGroup], shape: ModelShape) -> float:
    r"""F_min: every prompt once, every `ok` response once, the head on responses only, group by group.

    What groups share may be computed once for all of them: packed rows can take less.

    \(2t(P + \sum R_i) + 2h \sum R_i + 4dL [P^2/2 + \sum (R_i P + R_i^2/2)]\), summed over the groups.
    """
    total = 0.0
    for group in groups:
        lengths = [len(tokens) for tokens, status in zip(group.completion_tokens, group.status) if status == "ok"]
        if lengths:
            starts = [start for start, status in zip(group.prompt_starts, group.status) if status == "ok"]
            prompt, responses = len(group.prompt_tokens) - min(starts, default=0), sum(lengths)
            area = prompt**2 / 2 + responses * prompt + sum(length**2 for length in lengths) / 2
            total += shape.flops(trunk_tokens=prompt + responses, head_rows=responses, attention_area=area)
    return total


@dataclass(frozen=True)
class _Piece:
    """A group, or as many of its responses as fit with the prompt, before it has a place."""

    prompt: list[int]
    entries: list[TokenSequence]
    repeated: int
    """Prompt tokens that another piece of the group already holds."""

    @property
    def length(self) -> int:
        """Tokens, the prompt once."""
        return len(self.prompt) + sum(len(entry.tokens) - entry.prompt_length for entry in self.entries)


def pack(groups: Sequence[EncodedGroup], token_budget: int) -> list[PackedBatch]:
    """Pack the completions with status `ok` into rows of at most `token_budget` tokens.

    Groups whose prompts begin alike form bundles as large as the budget. Longest bundles first, each into the fullest
    row that still holds it (best fit): what else stands in a row changes no number beyond rounding. A group above the
    budget is split over its completions, repeating the prompt (counted in `repeated_prompt_tokens`); a single sequence
    above it gets a row of its own. Prompts cut differently for different completions (`prompt_starts`) are different
    prompts.

    Args:
        groups: Encoded groups; completions that are not `ok` have no output.
        token_budget: Tokens of one row, at least 1.

    Returns:
        Rows, fullest bundles first; their `completion_index` together name every `ok` completion once.

    Raises:
        UserError: A prompt has no token.
    """
    pieces = [piece for number, group in enumerate(groups) for piece in _pieces(number, group, token_budget)]
    bundles = _bundles(pieces, token_budget)
    bundles.sort(key=lambda bundle: -bundle[0])
    rows: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: of two equal rows the older one is taken
    for length, members in bundles:
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            left, number = token_budget, len(rows) - 1
        else:
            left, number = room.pop(place)
        rows[number] += members
        if left > length:
            bisect.insort(room, (left - length, number))
    return [_row(row) for row in rows]


def _pieces(number: int, group: EncodedGroup, token_budget: int) -> Iterator[_Piece]:
    """The group as pieces of at most the budget where that is possible."""
    starts = group.prompt_starts or (0,) * len(group.completion_tokens)
    ok = [i for i, status in enumerate(group.status) if status == "ok"]
    seen = 0
    for start in dict.fromkeys(starts[i] for i in ok):
        prompt = group.prompt_tokens[start:]
        if not prompt:
            raise UserError(f"group {number}: its prompt has no token, so nothing predicts the first response token")
        parts: list[list[TokenSequence]] = []
        length = token_budget + 1
        for i in (i for i in ok if starts[i] == start):
            response = group.completion_tokens[i]
            if not parts or length + len(response) > token_budget:
                parts.append([])
                length = len(prompt)
            parts[-1].append(TokenSequence((number, i), prompt + response, len(prompt)))
            length += len(response)
        for entries in parts:
            yield _Piece(prompt, entries, repeated=min(seen, len(prompt)))
            seen = max(seen, len(prompt))


def _bundles(pieces: list[_Piece], token_budget: int) -> list[tuple[int, list[_Piece]]]:
    """Runs of pieces, in the order of their prompts' tokens, whose prompts begin alike, with their tokens at most."""
    bundles: list[tuple[int, list[_Piece]]] = []
    for piece in sorted(pieces, key=lambda piece: piece.prompt):
        length, members = bundles[-1] if bundles else (0, [])
        shared = common_length(members[-1].prompt, piece.prompt) if members else 0
        # A trie branches where fewer than `MIN_SHARED` further tokens are shared, and so may repeat one fewer.
        joined = length + piece.length - (shared - MIN_SHARED + 1)
        if shared >= MIN_SHARED and joined <= token_budget:
            members.append(piece)
            bundles[-1] = (joined, members)
        else:
            bundles.append((piece.length, [piece]))
    return bundles


def _row(pieces: Sequence[_Piece]) -> PackedBatch:
    """Lay pieces side by side, those that begin alike over each other."""
    trie = lay_out([entry for piece in pieces for entry in piece.entries])
    row_E, before_E = (np.concatenate([path.response_rows(before=n) for path in trie.paths]) for n in (0, 1))
    row_R, first_R, token_E = np.unique(row_E, return_index=True, return_inverse=True)
    sizes = [sum(end - start for start, end in path.rows) - path.prompt_length for path in trie.paths]
    tokens_T = np.array(trie.tokens, dtype=np.int64)
    return PackedBatch(
        input_ids_T=torch.from_numpy(tokens_T),
        position_ids_T=torch.tensor(trie.positions, dtype=torch.int64),
        segments=tuple(trie.segments),
        rows_R=torch.from_numpy(before_E[first_R]),
        targets_R=torch.from_numpy(tokens_T[row_R]),
        token_E=torch.from_numpy(token_E),
        completion_E=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        paths=tuple(trie.paths),
        repeated_prompt_tokens=sum(piece.repeated for piece in pieces),
        shared_tokens=sum(piece.length for piece in pieces) - len(trie.tokens),
    )
