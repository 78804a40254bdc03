"""Ragged sequences -> rows of tokens: each token in its place, few places empty."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_cli.ppo import packing
from ppo_cli.ppo.packing import ROW_TOKENS, TokenBatch, balanced_rows
from ppo_cli.ppo.step_inputs import checked_batch

CPU = torch.device("cpu")
PAD = 99
QUERIES = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6])]
RESPONSES = [torch.tensor([10, 11, 12]), torch.tensor([20]), torch.tensor([], dtype=torch.long)]
HOLES = [torch.tensor([1, 0, 1]), torch.tensor([0]), torch.tensor([], dtype=torch.long)]
LAYOUTS = ["packed", "padded"]


def small(response_masks: list[Tensor] | None = None) -> TokenBatch:
    return TokenBatch.from_lists(QUERIES, RESPONSES, response_masks, PAD, CPU)


def random_batch(seed: int) -> tuple[TokenBatch, list[list[int]]]:
    """A ragged batch of tokens other than 0, and the tokens of each sequence that a model reads.

    These are the tokens before its last target, or none where no token counts.
    """
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    queries, responses, masks, read = [], [], [], []
    longest = [integer(1, 60), integer(1, 60)]
    for _ in range(integer(1, 40)):
        query, response = (
            torch.randint(1, 90, (n,), generator=g)
            for n in (integer(1, longest[0]), integer(0, longest[1]))
        )
        mask = torch.rand(len(response), generator=g) < integer(0, 2) / 2
        queries.append(query), responses.append(response), masks.append(mask)
        end = int(mask.nonzero().max()) if mask.any() else -len(query)
        read.append([*query.tolist(), *response.tolist()][: len(query) + end])
    return TokenBatch.from_lists(queries, responses, masks, PAD, CPU), read


RAGGED = [random_batch(seed) for seed in range(60)]


def stretches(inputs: dict[str, Tensor]) -> list[list[int]]:
    """The sequences in packed rows: in each the position ids count up from 0."""
    found: list[list[int]] = []
    for ids, positions in zip(
        inputs["input_ids"].tolist(), inputs["position_ids"].tolist(), strict=True
    ):
        for token, position in zip(ids, positions, strict=True):
            if position == 0:
                found.append([])
            assert position == len(found[-1])
            found[-1].append(token)
    return found


# ---------------------------------------------------------------- ragged lists -> grids


def test_ragged_sequences_are_laid_out_on_the_left_of_padded_rows() -> None:
    batch = small()
    assert batch.input_ids.tolist() == [
        [1, 2, 10, 11, 12],
        [3, 4, 5, 20, 99],
        [6, 99, 99, 99, 99],
    ]
    assert batch.targets.tolist() == [[10, 11, 12], [20, 0, 0], [0, 0, 0]]
    assert batch.sources[batch.mask].tolist() == [1, 2, 3, 2]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert batch.flat_targets.tolist() == [10, 11, 12, 20]
    assert len(batch) == 3


def test_response_tokens_that_a_mask_leaves_out_are_read_but_do_not_count() -> None:
    batch = small(HOLES)
    assert batch.input_ids.tolist() == small().input_ids.tolist()
    assert batch.flat_targets.tolist() == [10, 12]
    assert batch.mask.tolist() == [[True, True], [False, False], [False, False]]
    assert stretches(batch.packed[0]) == [[1, 2, 10, 11]]


def test_a_query_without_tokens_and_a_mask_of_another_length_are_refused() -> None:
    empty = torch.tensor([], dtype=torch.long)
    with pytest.raises(ValueError, match="query 1 has no tokens"):
        TokenBatch.from_lists([QUERIES[0], empty], RESPONSES[:2], None, 0, CPU)
    with pytest.raises(ValueError, match="response mask 1"):
        small([torch.ones(3), torch.ones(2), torch.ones(0)])


def test_to_grid_puts_flat_numbers_back_where_their_tokens_stand() -> None:
    grid = small().to_grid(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert grid.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_flat_undoes_to_grid() -> None:
    for batch, _ in RAGGED:
        numbers = torch.arange(1.0, 1 + len(batch.flat_targets))
        grid = batch.to_grid(numbers)
        assert torch.equal(batch.flat(grid), numbers)
        assert torch.equal(grid != 0, batch.mask)
        assert torch.equal(batch.flat(batch.targets), batch.flat_targets)


def test_to_grid_and_flat_let_gradients_through() -> None:
    batch, flat = small(), torch.ones(4, requires_grad=True)
    (batch.to_grid(flat) * torch.arange(9.0).view(3, 3)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [0.0, 1.0, 2.0, 3.0]
    grid = torch.ones(3, 3, requires_grad=True)
    (batch.flat(grid) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert grid.grad is not None
    assert grid.grad.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_to_rows_puts_each_number_in_the_column_that_predicts_its_token() -> None:
    masks = [torch.tensor([1, 0, 1]), torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    batch = small(masks)
    grid = batch.to_grid(torch.tensor([5.0, 6.0, 7.0])) + (~batch.mask) * 100.0
    assert batch.to_rows(grid).tolist() == [
        [0.0, 5.0, 0.0, 6.0],
        [0.0, 0.0, 7.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_select_takes_sequences_in_order_and_trims_grids_to_the_longest_of_them() -> None:
    chosen = small().select(torch.tensor([2, 1]))
    assert chosen.input_ids[:, :4].tolist() == [[6, 99, 99, 99], [3, 4, 5, 20]]
    assert chosen.mask.tolist() == [[False], [True]]
    assert chosen.flat_targets.tolist() == [20]
    nothing = small().select(torch.tensor([2]))
    assert nothing.mask.shape == (1, 0)
    assert nothing.flat_targets.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_selection_reads_is_what_its_sequences_read(layout: str) -> None:
    for batch, read in RAGGED:
        indices = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))[:7]
        chosen = batch.select(indices)
        inputs, positions = getattr(chosen, layout)
        before = [read[i] for i in indices.tolist() if read[i]]
        assert len(positions) == int(batch.counts[indices].sum())
        if layout == "packed" and before:
            kept = [s for s in stretches(inputs) if s != [0]]
            assert sorted(kept) == sorted(before)


# ---------------------------------------------------------------- what a model reads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flat_position_holds_the_token_just_before_its_target(layout: str) -> None:
    for batch, _ in RAGGED:
        inputs, positions = getattr(batch, layout)
        rows, columns = batch.mask.nonzero(as_tuple=True)
        before = batch.input_ids[rows, batch.sources[rows, columns]]
        assert inputs["input_ids"].flatten()[positions].tolist() == before.tolist()
        after = batch.input_ids[rows, batch.sources[rows, columns] + 1]
        assert after.tolist() == batch.flat_targets.tolist()
        assert len(set(positions.tolist())) == len(positions)


def test_packed_positions_lie_in_their_own_sequence_at_their_own_column() -> None:
    for batch, read in RAGGED:
        inputs, positions = batch.packed
        rows, columns = batch.mask.nonzero(as_tuple=True)
        sources = batch.sources[rows, columns]
        assert inputs["position_ids"].flatten()[positions].tolist() == sources.tolist()
        flat = inputs["input_ids"].flatten().tolist()
        for place, row, source in zip(
            *(t.tolist() for t in (positions, rows, sources)), strict=True
        ):
            start = place - source
            assert flat[start : start + len(read[row])] == read[row]


def test_packing_splits_no_sequence_loses_none_and_adds_none() -> None:
    for batch, read in RAGGED:
        inputs, _ = batch.packed
        if not any(read):
            continue
        kept = [sequence for sequence in stretches(inputs) if sequence != [0]]  # padding
        assert sorted(kept) == sorted(sequence for sequence in read if sequence)


def test_padding_alone_in_packed_rows_is_told_apart_by_its_position() -> None:
    for batch, _ in RAGGED:
        inputs, _ = batch.packed
        padding = inputs["input_ids"] == 0
        assert (inputs["position_ids"][padding] == 0).all()


def test_padded_rows_are_the_sequences_themselves_with_a_mask_over_what_is_read() -> None:
    for batch, read in RAGGED:
        inputs, _ = batch.padded
        for sequence, ids, mask in zip(
            read, inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
        ):
            length = max(len(sequence), 1)  # a row of padding alone gives NaN
            assert mask == [1] * length + [0] * (len(ids) - length)
            assert ids[: len(sequence)] == sequence
        assert inputs["input_ids"].shape[1] == max(len(s) or 1 for s in read)


def test_a_pad_token_inside_a_sequence_is_still_attended_to_and_counts() -> None:
    batch = TokenBatch.from_lists(
        [torch.tensor([9, 1])], [torch.tensor([9, 9])], None, pad_token_id=9, device=CPU
    )
    assert batch.padded[0]["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch.flat_targets.tolist() == [9, 9]


def test_little_of_the_packed_rows_is_padding_and_no_row_is_much_too_long() -> None:
    wasted = []
    for batch, read in RAGGED:
        inputs, _ = batch.packed
        lengths = [len(sequence) for sequence in read if sequence]
        height, width = inputs["input_ids"].shape
        if not lengths:
            continue
        target = max(ROW_TOKENS, max(lengths))
        assert width <= max(1.5 * target, 1.25 * target + max(lengths))
        assert height * width - sum(lengths) < height * max(lengths)
        wasted.append(1 - sum(lengths) / (height * width))
    assert sum(wasted) / len(wasted) < 0.08


def test_batches_of_the_usual_shape_waste_a_sixth_of_what_padded_rows_do() -> None:
    places = {"packed": 0, "padded": 0}
    tokens = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        queries, responses = (
            [
                torch.ones(int(n), dtype=torch.long)
                for n in torch.randint(*bounds, (128,), generator=g)
            ]
            for bounds in ((2, 9), (4, 17))
        )
        batch = TokenBatch.from_lists(queries, responses, None, 0, CPU)
        for layout in LAYOUTS:
            inputs, _ = getattr(batch, layout)
            places[layout] += inputs["input_ids"].numel()
        assert batch.packed[0]["input_ids"].shape[1] < 1.2 * ROW_TOKENS
        tokens += sum(map(len, queries)) + sum(map(len, responses)) - 128
    assert places["packed"] - tokens < (places["padded"] - tokens) / 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mini_batch_without_targets_still_gives_a_model_something_to_read(layout: str) -> None:
    no_tokens = TokenBatch.from_lists(QUERIES, [RESPONSES[2]] * 3, None, 0, CPU)
    no_counts = TokenBatch.from_lists(
        QUERIES[:2], RESPONSES[:2], [torch.zeros(3), torch.zeros(1)], 0, CPU
    )
    for batch in (no_tokens, no_counts, small(HOLES).select(torch.tensor([1, 2]))):
        inputs, positions = getattr(batch, layout)
        assert inputs["input_ids"].numel() > 0
        assert positions.numel() == 0
        assert not batch.mask.any()
        assert batch.flat_targets.numel() == 0
        if layout == "padded":
            assert inputs["attention_mask"].any(1).all()


# ---------------------------------------------------------------- rows


def test_balanced_rows_overlap_nowhere_leave_no_holes_and_are_as_many_as_the_target_says() -> None:
    g = torch.Generator().manual_seed(0)
    for target in (1, 7, 64, 1000):
        for count in (1, 2, 9, 40):
            lengths = torch.randint(0, 30, (count,), generator=g).tolist()
            rows, columns = balanced_rows(lengths, target)
            places = [
                (row, column + i)
                for row, column, length in zip(rows, columns, lengths, strict=True)
                for i in range(length)
            ]
            assert len(set(places)) == len(places) == sum(lengths)
            expected = max(round(sum(lengths) / target), 1)
            filled = {row for row, _ in places}
            assert filled == set(range(len(filled)))
            assert len(filled) <= expected + 1
            fill = [sum(row == r for row, _ in places) for r in filled]
            assert max(fill, default=0) - min(fill, default=0) <= max(lengths)
            for row in filled:
                there = [column for r, column in places if r == row]
                assert set(there) == set(range(len(there)))
            empty = [i for i, length in enumerate(lengths) if not length]
            assert all((rows[i], columns[i]) == (0, 0) for i in empty)


def shortest(lengths: list[int], count: int) -> int:
    """Smallest possible width of `count` rows that hold all sequences, by trying all ways."""
    return min(
        max(
            sum(n for n, row in zip(lengths, choice, strict=True) if row == r) for r in range(count)
        )
        for choice in itertools.product(range(count), repeat=len(lengths))
    )


def test_balanced_rows_come_near_the_best_that_brute_force_finds() -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        lengths = torch.randint(1, 20, (7,), generator=g).tolist()
        rows, columns = balanced_rows(lengths, -(-sum(lengths) // 2))
        width = max(column + length for column, length in zip(columns, lengths, strict=True))
        best = min(count * shortest(lengths, count) for count in (2, 3))
        assert (max(rows) + 1) * width <= 13 / 11 * best  # the method's bound (Yue 1990)


def test_rows_of_many_sequences_have_next_to_no_padding() -> None:
    g = torch.Generator().manual_seed(2)
    for count in (32, 128, 512):
        lengths = torch.randint(5, 22, (count,), generator=g).tolist()
        rows, columns = balanced_rows(lengths, ROW_TOKENS)
        width = max(column + length for column, length in zip(columns, lengths, strict=True))
        assert (max(rows) + 1) * width < 1.04 * sum(lengths)
        assert 0.75 * ROW_TOKENS < width < 1.3 * ROW_TOKENS


def test_rows_aim_at_the_longest_sequence_where_it_is_longer_than_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "ROW_TOKENS", 4)
    queries = [torch.arange(1, 9), *[torch.tensor([i]) for i in range(1, 9)]]
    responses = [torch.tensor([1])] * 9
    inputs, _ = TokenBatch.from_lists(queries, responses, None, 0, CPU).packed
    assert inputs["input_ids"].shape == (2, 8)


# ---------------------------------------------------------------- what is passed to step()


def test_checked_batch_gives_scores_as_float32_whatever_their_shape_and_type() -> None:
    scores = [torch.tensor(1.5, dtype=torch.float64), torch.tensor([2]), torch.tensor(-1.0)]
    checked = checked_batch(QUERIES, RESPONSES, scores, None, 3)
    assert checked.dtype == torch.float32
    assert checked.tolist() == [1.5, 2.0, -1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(3, 2)}, "queries must be a list"),
        ({"responses": RESPONSES[:2]}, r"Batch size \(3\).*2 for: responses"),
        ({"responses": [[1], [2], [3]]}, "Elements in responses must be tensors"),
        ({"queries": [torch.ones(1, 2)] * 3}, "queries must be 1-dimensional"),
        ({"scores": [torch.ones(()), torch.tensor(float("nan")), torch.ones(())]}, r"scores\[1\]"),
        ({"scores": [torch.ones(2), torch.ones(()), torch.ones(())]}, r"scores\[0\]"),
        ({"response_masks": RESPONSES[:1]}, "1 for: response_masks"),
    ],
)
def test_checked_batch_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    batch = {
        "queries": QUERIES,
        "responses": RESPONSES,
        "scores": [torch.ones(())] * 3,
        "response_masks": None,
        "batch_size": 3,
    }
    with pytest.raises(ValueError, match=message):
        checked_batch(**{**batch, **change})
