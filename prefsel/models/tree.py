"""Packing: many groups `[prompt | y_1 | … | y_K]` in one row of tokens without padding, under a token budget.

    row:        p p p p a a a b b │ q q c c c d │ …          two segments; a, b share the prompt p
    positions:  0 1 2 3 4 5 6 4 5 │ 0 1 2 3 4 2 │ …          they restart after the prompt for every response

Shapes: T tokens of the row, R response tokens in it, C completions in it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup


@dataclass(frozen=True)
class Segment:
    """Where one prompt and its responses lie in the row; the responses follow the prompt and each other."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]
    repeated: int = 0
    """Prompt tokens that another segment of the same group already holds."""

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.prompt_length + sum(self.response_lengths)

    @property
    def responses(self) -> list[tuple[int, int]]:
        """(start, end) of each response in the row."""
        bounds = list(accumulate(self.response_lengths, initial=self.start + self.prompt_length))
        return list(pairwise(bounds))


@dataclass(frozen=True)
class PackedBatch:
    """One row of packed segments, and where its outputs are."""

    input_ids_T: Tensor
    """Token ids, int64."""
    position_ids_T: Tensor
    """Position of each token in its own sequence (prompt + one response), int64."""
    segments: tuple[Segment, ...]
    rows_R: Tensor
    """The hidden row that predicts each response token: the token before it, the prompt's last for the first."""
    targets_R: Tensor
    """The response tokens themselves, int64."""
    completion_R: Tensor
    """Which completion each response token belongs to, 0 … C−1."""
    completion_index: list[tuple[int, int]]
    """For each of the C outputs: (position of its group in the packed sequence of groups, completion in the group)."""

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
        return len(self.completion_index)

    @property
    def repeated_prompt_tokens(self) -> int:
        """Tokens of the row that would not be there had every group fitted into the budget."""
        return sum(segment.repeated for segment in self.segments)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids_T", "position_ids_T", "rows_R", "targets_R", "completion_R")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
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
    r"""F_min: every prompt once, every `ok` response once, the head on responses only.

    \(2t(P + \sum R_i) + 2h \sum R_i + 4dL [P^2/2 + \sum (R_i P + R_i^2/2)]\), summed over the groups.
    """
    total = 0.0
    for group in groups:
        lengths = [len(tokens) for tokens, status in zip(group.completion_tokens, group.status) if status == "ok"]
        if lengths:
            prompt, responses = len(group.prompt_tokens) - min(group.prompt_starts, default=0), sum(lengths)
            area = prompt**2 / 2 + responses * prompt + sum(length**2 for length in lengths) / 2
            total += shape.flops(trunk_tokens=prompt + responses, head_rows=responses, attention_area=area)
    return total


@dataclass(frozen=True)
class _Piece:
    """A prompt with some of its responses, before it has a place."""

    group: int
    prompt: list[int]
    responses: list[tuple[int, list[int]]]
    repeated: int

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(tokens) for _, tokens in self.responses)


def pack(groups: Sequence[EncodedGroup], token_budget: int) -> list[PackedBatch]:
    """Pack the completions with status `ok` into rows of at most `token_budget` tokens.

    Longest segments first, each into the fullest row that still holds it (best fit): attention never looks across
    segments, so only the number of rows matters, not what lies together. A group above the budget is split over its
    completions, repeating the prompt (counted in `repeated_prompt_tokens`); a single sequence above it gets a row of
    its own. Prompts cut differently for different completions (`prompt_starts`) are different segments.

    Args:
        groups: Encoded groups; completions that are not `ok` have no output.
        token_budget: Tokens of one row, at least 1.

    Returns:
        Rows, fullest segments first; their `completion_index` together name every `ok` completion once.

    Raises:
        UserError: A prompt has no token.
    """
    pieces = [piece for number, group in enumerate(groups) for piece in _pieces(number, group, token_budget)]
    pieces.sort(key=lambda piece: -piece.length)
    rows: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: of two equal rows the older one is taken
    for piece in pieces:
        place = bisect.bisect_left(room, (piece.length, -1))
        if place == len(room):
            rows.append([])
            left, number = token_budget, len(rows) - 1
        else:
            left, number = room.pop(place)
        rows[number].append(piece)
        if left > piece.length:
            bisect.insort(room, (left - piece.length, number))
    return [_row(row) for row in rows]


def _pieces(number: int, group: EncodedGroup, token_budget: int) -> Iterator[_Piece]:
    """The group as segments of at most the budget where that is possible."""
    if not group.prompt_tokens and "ok" in group.status:
        raise UserError(f"group {number}: its prompt has no token, so nothing predicts the first response token")
    starts = group.prompt_starts or (0,) * len(group.completion_tokens)
    ok = [i for i, status in enumerate(group.status) if status == "ok"]
    seen = 0
    for start in dict.fromkeys(starts[i] for i in ok):
        prompt = group.prompt_tokens[start:]
        members: list[list[tuple[int, list[int]]]] = []
        length = token_budget + 1
        for i in (i for i in ok if starts[i] == start):
            tokens = group.completion_tokens[i]
            if not members or length + len(tokens) > token_budget:
                members.append([])
                length = len(prompt)
            members[-1].append((i, tokens))
            length += len(tokens)
        for responses in members:
            yield _Piece(number, prompt, responses, repeated=min(seen, len(prompt)))
            seen = max(seen, len(prompt))


def _row(pieces: list[_Piece]) -> PackedBatch:
    """Lay pieces side by side."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    owners: list[int] = []
    segments: list[Segment] = []
    index: list[tuple[int, int]] = []
    for piece in pieces:
        start, prompt_length = len(ids), len(piece.prompt)
        ids += piece.prompt
        positions += range(prompt_length)
        for completion, tokens in piece.responses:
            if tokens:
                rows.append(start + prompt_length - 1)
                rows += range(len(ids), len(ids) + len(tokens) - 1)
            owners += [len(index)] * len(tokens)
            ids += tokens
            positions += range(prompt_length, prompt_length + len(tokens))
            index.append((piece.group, completion))
        lengths = tuple(len(tokens) for _, tokens in piece.responses)
        segments.append(Segment(start, prompt_length, lengths, piece.repeated))
    targets = [t for piece in pieces for _, tokens in piece.responses for t in tokens]
    return PackedBatch(
        input_ids_T=torch.tensor(ids),
        position_ids_T=torch.tensor(positions),
        segments=tuple(segments),
        rows_R=torch.tensor(rows, dtype=torch.int64),
        targets_R=torch.tensor(targets, dtype=torch.int64),
        completion_R=torch.tensor(owners, dtype=torch.int64),
        completion_index=index,
    )
