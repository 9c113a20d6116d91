"""Every method through the real machinery, and its numbers at the end against plain transformers and autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.identity import fold_of
from prefsel.models.chat import Encoder
from prefsel.pairs.export import export_rows
from prefsel.pipeline import Outcome, run
from prefsel.plan.columns import pair_reader
from prefsel.plan.models import find_model, find_models
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages.train import require_weights
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

WORDS = ["red", "green", "blue", "small", "large", "round", "old", "new"]
ASPECTS = ["brief", "red"]
SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "steps": 8, "batch_tokens": 512, "max_length": 64}
FAST = {"learning_rate": 3e-3, "dtype": "fp32", "global_batch_pairs": 8, "micro_batch_pairs": 8, "max_steps": 3}
DPO = {**FAST, "model": "policy", "reference": "policy", "max_eval_pairs": 8}
MODELS = {"policy": "theta", "reference": "policy"}


def corpus(path: Path) -> str:
    """60 prompts with three completions, rated for two aspects that often disagree."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        texts = [" ".join(rng.choice(WORDS, size)) for size in (3, 5, 8)]
        rated = [{"brief": 9 - len(text.split()), "red": 1 + text.count("red")} for text in texts]
        completions = [
            {"response": text, "annotations": {name: {"Rating": str(min(5, value))} for name, value in row.items()}}
            for text, row in zip(texts, rated)
        ]
        row = {"source": "made", "instruction": f"describe thing {number}", "completions": completions}
        rows.append(row | {"annotator": ("ann", "bob", None)[number % 3]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(source: str) -> dict[str, Any]:
    band = {"kind": "band", "low": 10, "high": 90}
    return {
        "name": "methods",
        "sources": [{"name": "a", "paths": [source], "format": "ultrafeedback", "carry": ["annotator"]}],
        "ingest": {"rows_per_shard": 30},
        "split": {"holdout": 0.1, "proxy": 0.15, "validation": 0.2},
        "models": [
            {"kind": "scratch_policy", "name": "policy", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE},
            {"kind": "scratch_reward", "name": "judge", "tokenizer": {"kind": "bpe", "vocab_size": 300}, **SHAPE},
        ],
        "train": [
            {"kind": "reward", "name": "rm", "model": "policy", "aspects": ASPECTS, **FAST},
            {**DPO, "name": "theta", "selection": "all", "keep_optimizer_state": True},
            {**DPO, "name": "theta_val", "selection": "validation", "model": "theta"},
            {**DPO, "name": "cross", "selection": "all", "cross_fit": {"folds": 2, "seed": 1}},
            {**DPO, "name": "re-po", "selection": "all", "weight": "right", "weighting": "label"},
            {**DPO, "name": "weighed", "selection": "pd30", "weight": "who", "model": "theta"},
        ],
        "tangents": [
            {"name": "v", "model": "theta", "reference": "policy"},
            {"name": "w", **{"model": "theta", "reference": "policy"}, "by": "aspect", "values": ASPECTS},
        ],
        # What needs most comes first: the order of the list must not matter.
        "scorers": [
            {"kind": "reward_model", "model": "rm"},
            {"kind": "causal_logps", "model": "theta"},
            {"kind": "causal_logps", "model": "policy"},
            {"kind": "causal_logps", "model": "theta_val"},
            {"kind": "causal_logps", "model": "cross"},
            {"kind": "directional_logps", "tangent": "v"},
            {"kind": "directional_logps", "tangent": "w"},
            {"kind": "pair_gradients", "tangent": "v"},
            {"kind": "causal_logps", "model": "policy", "unconditional": True},
            {"kind": "reward_model", "model": "judge"},
            {"kind": "generated_reward", "model": "judge", "policy": "policy", "max_new_tokens": 16},
        ],
        "metrics": [
            {"name": "pd", "metric": "preference_divergence", "params": {"aspects": ASPECTS, "rho": "fit"}},
            {"name": "if", "metric": "influence", "params": {**MODELS, "tangent": "v"}},
            {"name": "if-red", "metric": "influence", "params": {**MODELS, "tangent": "w-red"}},
            {"name": "ld", "metric": "lossdiff", "params": {**MODELS, "validation_policy": "theta_val"}},
            {"name": "irm", "metric": "implicit_margin", "params": MODELS},
            {"name": "less", "metric": "less", "params": {"tangent": "v"}},
            {"name": "easy", "metric": "selective_dpo", "params": {"policies": ["cross"], "reference": "policy"}},
            {"name": "dual", "metric": "dual_margin", "params": {"implicit": [MODELS], "upper": "quantile"}},
            {"name": "ifd", "metric": "ifd_margin", "params": {"policy": "policy"}},
            {"name": "filtered", "metric": "filtered_dpo", "params": {"rm": "judge"}},
            {"name": "spread", "metric": "data_map", "params": {"rm": "judge", "axis": "variance"}},
            {"name": "right", "metric": "reliability", "params": MODELS},
            {"name": "who", "metric": "reliability", "params": {**MODELS, "by": "annotator"}},
        ],
        "selections": [
            {"name": "pd30", "rule": {"kind": "top", "score": "score_pd", "ratio": 0.3}},
            {"name": "tif", "rule": {"kind": "band", "score": "score_if", "low": 20, "high": 80}},
            {
                "name": "both",
                "rule": {
                    "kind": "intersect",
                    "rules": [{**band, "score": "score_ld"}, {**band, "score": "score_irm"}],
                    "budget": {"ratio": 0.4},
                },
            },
            {"name": "less10", "rule": {"kind": "top", "score": "score_less", "ratio": 0.1}, "controls": ["random"]},
            {"name": "easy50", "rule": {"kind": "top", "score": "score_easy", "ratio": 0.5}},
            {"name": "dual30", "rule": {"kind": "top", "score": "score_dual", "ratio": 0.3}},
            {"name": "better", "rule": {"kind": "above", "score": "score_filtered", "threshold": 0.0}},
            {
                "name": "one-each",
                "rule": {
                    "kind": "dedupe",
                    "by": "prompt",
                    "rule": {"kind": "fuse", "scores": ["score_ifd", "score_spread"], "how": "rank", "ratio": 0.5},
                },
            },
        ],
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Plan, Outcome]:
    home = tmp_path_factory.mktemp("methods")
    config = parse_config(table(corpus(home / "corpus.jsonl")))
    outcome = run(config, str(home / "w"), Progress())
    return make_plan(config, Storage(str(home / "w"))), outcome


def rows_of(plan: Plan, reason: str | None) -> list[dict[str, Any]]:
    """The pairs of a part with their texts and every number, corpus order."""
    reader, found = pair_reader(plan, plan.scorers), []
    for shard in plan.catalog.shards:
        pairs, flat = reader.pairs(shard), reader.flat(shard)
        dropped = flat["dropped"]
        mine = pc.is_null(dropped) if reason is None else pc.equal(dropped, reason).fill_null(False)
        row_N = np.flatnonzero(mine.to_numpy())
        found += export_rows(row_N, pairs, reader.groups(shard), flat, {}).to_pylist()
    return found


def scores_of(plan: Plan, metric: str) -> dict[str, float]:
    """Score of every scored pair, by hex id."""
    folder, found = plan.node("scores", metric).path, {}
    for shard in plan.catalog.shards:
        scored = Artifact(plan.storage, f"{folder}/{shard.source}").read(shard.shard, ["pair_id", "score"])
        found.update({row["pair_id"].hex(): row["score"] for row in scored.to_pylist() if row["score"] is not None})
    return found


class Plain:
    """A model of the run, as transformers loads it; one sequence at a time."""

    def __init__(self, plan: Plan, path: str) -> None:
        folder = plan.storage.local(path)
        self.model = AutoModelForCausalLM.from_pretrained(folder).double()
        self.encoder = Encoder(AutoTokenizer.from_pretrained(folder))

    def logp(self, prompt: Any, response: Any) -> torch.Tensor:
        (group,) = self.encoder.encode_groups([(prompt, [response])])
        ids = torch.tensor([group.prompt_tokens + group.completion_tokens[0]])
        logps_TV = self.model(input_ids=ids).logits[0, len(group.prompt_tokens) - 1 : -1].log_softmax(-1)
        return logps_TV.gather(1, torch.tensor(group.completion_tokens[0])[:, None]).sum()

    def margin(self, row: dict[str, Any]) -> torch.Tensor:
        return self.logp(row["prompt"], row["chosen"]) - self.logp(row["prompt"], row["rejected"])

    def loss_gradient(self, row: dict[str, Any], reference: Plain) -> torch.Tensor:
        """Gradient of the DPO loss of one pair, all weights in one vector."""
        self.model.zero_grad()
        with torch.no_grad():
            offset = reference.margin(row)
        torch.nn.functional.softplus(-0.1 * (self.margin(row) - offset)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


@pytest.fixture(scope="module")
def models(done: tuple[Plan, Outcome]) -> tuple[Plain, Plain]:
    plan, _ = done
    return Plain(plan, find_model(plan, "theta").path), Plain(plan, find_model(plan, "policy").path)


def test_the_workspace_is_whole_and_a_second_run_does_nothing(done: tuple[Plan, Outcome]) -> None:
    plan, outcome = done
    assert verify(plan.storage).is_clean
    for report in outcome.reports:
        assert report.rows_in == report.rows_out + sum(report.dropped.values())
    assert not run(plan.config, plan.storage.uri, Progress()).is_new


def test_influence_is_the_inner_product_of_explicit_gradients(
    done: tuple[Plan, Outcome], models: tuple[Plain, Plain]
) -> None:
    plan, (theta, policy) = done[0], models
    validation = rows_of(plan, "validation")
    strata = {"if": validation, "if-red": [row for row in validation if row["aspect"] == "red"]}
    chosen = rows_of(plan, None)[:6]
    for metric, aimed_at in strata.items():
        target = torch.stack([theta.loss_gradient(row, policy) for row in aimed_at]).mean(0)
        explicit = np.array([float(theta.loss_gradient(row, policy) @ target) for row in chosen])
        stored = np.array([scores_of(plan, metric)[row["pair_id"]] for row in chosen])
        largest = max(map(abs, scores_of(plan, metric).values()))
        assert np.abs(stored - explicit).max() <= 3e-5 * largest


def test_less_is_the_cosine_of_the_adam_feature(done: tuple[Plan, Outcome], models: tuple[Plain, Plain]) -> None:
    from safetensors.torch import load_file

    plan, (theta, policy) = done[0], models
    folder = plan.storage.local(f"{find_model(plan, 'theta').path}/optimizer")
    moments = {name: load_file(folder / f"{name}.safetensors") for name in ("exp_avg", "exp_avg_sq")}
    names = [name for name, _ in theta.model.named_parameters()]
    m, v = (torch.cat([moments[kind][name].flatten() for name in names]).double() for kind in moments)
    target = torch.stack([theta.loss_gradient(row, policy) for row in rows_of(plan, "validation")]).mean(0)
    for row in rows_of(plan, None)[:4]:
        g = theta.loss_gradient(row, policy)
        feature = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g * g + 1e-8).sqrt()
        expected = float(feature @ target / (feature.norm() * target.norm()))
        assert scores_of(plan, "less")[row["pair_id"]] == pytest.approx(expected, abs=1e-4)


def test_lossdiff_is_the_difference_of_plain_losses(done: tuple[Plan, Outcome], models: tuple[Plain, Plain]) -> None:
    plan, (theta, policy) = done[0], models
    after = Plain(plan, find_model(plan, "theta_val").path)
    for row in rows_of(plan, None)[:4]:
        with torch.no_grad():
            before, tuned = (
                torch.nn.functional.softplus(-0.1 * (m.margin(row) - policy.margin(row))) for m in (theta, after)
            )
        assert scores_of(plan, "ld")[row["pair_id"]] == pytest.approx(float(before - tuned), abs=2e-6)


def test_reward_models_score_only_prompts_of_other_aspects(done: tuple[Plan, Outcome]) -> None:
    rows = rows_of(done[0], None)
    assert {row["aspect"] for row in rows} == set(ASPECTS)
    for row in rows:
        for aspect in ASPECTS:
            assert (row[f"rm_{aspect}_chosen"] is None) == (row["aspect"] == aspect)


def test_cross_fitted_models_score_what_they_were_not_trained_on(done: tuple[Plan, Outcome]) -> None:
    plan, _ = done
    folds = [Plain(plan, ref.path) for ref in find_models(plan, "cross").values()]
    rows = rows_of(plan, None)[:8]
    found = fold_of([bytes.fromhex(row["prompt_id"]) for row in rows], folds=2, seed=1)
    assert set(found) == {0, 1}
    for row, fold in zip(rows, found):
        with torch.no_grad():
            own, other = (float(folds[k].logp(row["prompt"], row["chosen"])) for k in (fold, 1 - fold))
        assert row["logps_cross_chosen"] == pytest.approx(own, rel=1e-5)
        assert abs(own - other) > 1e-4


def test_selections_keep_their_budgets(done: tuple[Plan, Outcome]) -> None:
    kept = {report.name: (report.rows_in, report.rows_out) for report in done[1].reports if report.stage == "select"}
    for name, share in {"pd30": 0.3, "both": 0.4, "less10": 0.1, "easy50": 0.5, "dual30": 0.3}.items():
        assert kept[name][1] == int(kept[name][0] * share + 1e-9)
    assert kept["less10-random"][1] == kept["less10"][1]
    assert 0.5 < kept["tif"][1] / kept["tif"][0] < 0.65


@pytest.mark.parametrize(("name", "by"), [("right", "source"), ("who", "annotator")])
def test_reliability_is_the_naive_fixed_point(done: tuple[Plan, Outcome], name: str, by: str) -> None:
    """Over two shards, from the log-probs of θ and reference that lie beside the pairs; its η stand in the report."""
    plan, outcome = done
    rows, found = rows_of(plan, None), scores_of(plan, name)
    report = next(one for one in outcome.reports if one.stage == "metric" and one.name == name)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row[by] is not None:
            groups.setdefault(row[by], []).append(row)
    assert report.dropped.get("missing_annotator", 0) == sum(row[by] is None for row in rows)
    assert (report.dropped.get("missing_annotator", 0) > 0) is (by == "annotator")
    assert report.details["fitted"]["eta_pairs"] == {group: len(many) for group, many in groups.items()}
    for group, many in groups.items():
        ratio = {
            side: np.array([row[f"logps_theta_{side}"] - row[f"logps_policy_{side}"] for row in many])
            for side in ("chosen", "rejected")
        }
        right_N, eta = 1 / (1 + np.exp(-0.1 * (ratio["chosen"] - ratio["rejected"]))), 0.9
        for _ in range(200_000):
            weight_N = right_N * eta / (right_N * eta + (1 - right_N) * (1 - eta))
            if abs(weight_N.mean() - eta) < 1e-15:
                break
            eta = float(weight_N.mean())
        # Where it has not come to rest, EM is still on its way from 0.9 to what was found.
        share, is_at_rest = report.details["fitted"]["eta"][group], abs(weight_N.mean() - eta) < 1e-15
        told_N = np.array([found[row["pair_id"]] for row in many])
        if is_at_rest:
            assert share == pytest.approx(eta, abs=1e-8)
            assert told_N == pytest.approx(weight_N, abs=1e-8)
        else:
            assert (share > eta) is (eta > 0.9)
        assert told_N.mean() == pytest.approx(share, abs=1e-12)
        odds_N = right_N * share / np.maximum(right_N * share + (1 - right_N) * (1 - share), 1e-300)
        assert told_N == pytest.approx(odds_N, abs=1e-9)


def test_trainings_with_weights_count_what_has_none(done: tuple[Plan, Outcome]) -> None:
    plan, outcome = done
    trained = {report.name: report for report in outcome.reports if report.stage == "train"}
    scores = {report.name: report for report in outcome.reports if report.stage == "metric"}
    assert trained["re-po"].rows_out == scores["right"].rows_out
    assert trained["re-po"].details["weight"] == "right"
    known = scores_of(plan, "who")
    kept = [row["pair_id"] for row in rows_of(plan, None) if row["pair_id"] in selected(plan, "pd30")]
    assert trained["weighed"].dropped["missing_weight"] == sum(one not in known for one in kept) > 0
    assert trained["weighed"].rows_out == sum(one in known for one in kept)
    first = next(one for one in trained["re-po"].details["history"] if one["event"] == "step")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)  # both ways round, of zero margins


def test_weights_that_cannot_be_any_are_refused_before_a_worker_starts(done: tuple[Plan, Outcome]) -> None:
    plan, _ = done
    spec = next(one for one in plan.config.train if one.name == "re-po")
    margins = list(scores_of(plan, "irm").values())
    told = rf"train.re-po.weight: the scores of 'irm' run from {min(margins):.6g} to {max(margins):.6g}; valid: from 0"
    for weighting in ("loss", "label"):
        with pytest.raises(UserError, match=told):
            require_weights(plan, spec.model_copy(update={"weight": "irm", "weighting": weighting}))
    require_weights(plan, spec)


def selected(plan: Plan, name: str) -> set[str]:
    folder = plan.node("selection", name).path
    found: set[str] = set()
    for shard in plan.catalog.shards:
        ids = Artifact(plan.storage, f"{folder}/{shard.source}").read(shard.shard)["pair_id"].to_pylist()
        found |= {one.hex() for one in ids}
    return found


def test_a_fusion_keeps_one_pair_of_each_prompt(done: tuple[Plan, Outcome]) -> None:
    plan, outcome = done
    report = next(one for one in outcome.reports if one.stage == "select" and one.name == "one-each")
    folder, prompts = report.artifact, []
    for source in plan.storage.folders(folder):
        artifact = Artifact(plan.storage, f"{folder}/{source}")
        prompts += [one for shard in artifact.entries() for one in artifact.read(shard)["prompt_id"].to_pylist()]
    assert len(prompts) == len(set(prompts)) == report.rows_out
    eligible = {row["prompt_id"] for row in rows_of(plan, None)}
    assert report.rows_out == len(eligible) // 2


def test_filtered_dpo_keeps_what_beats_the_policys_own_response(done: tuple[Plan, Outcome]) -> None:
    plan, outcome = done
    rows = rows_of(plan, None)
    said = [row for row in rows if row["rm_judge_generated_chosen"] is not None]  # a response may be empty
    beaten = {row["pair_id"]: row["rm_judge_chosen"] - row["rm_judge_generated_chosen"] for row in said}
    report = next(one for one in outcome.reports if one.stage == "select" and one.name == "better")
    assert report.rows_out == sum(value > 0 for value in beaten.values()) > 0
    assert scores_of(plan, "filtered") == {one: pytest.approx(value) for one, value in beaten.items()}


def test_the_report_says_what_each_selection_cost(done: tuple[Plan, Outcome]) -> None:
    plan, outcome = done
    assert outcome.page is not None
    page = json.loads(plan.storage.read(outcome.page.replace("index.html", "report.json")))
    cost = next(one for one in page["tables"] if one["title"] == "What each selection cost")
    rows = {row[0]: dict(zip(cost["columns"], row)) for row in cost["rows"]}
    assert set(rows) == {selection.name for selection in plan.config.selections}
    # θ and reference once each, and a derivative that costs three forwards.
    assert rows["tif"]["scoring"] == pytest.approx(5.0, rel=0.02)
    trained = {name for name, row in rows.items() if row["training"] > 0}
    assert trained == {"pd30", "tif", "both", "less10", "easy50", "dual30"}


def test_a_validation_source_that_shares_prompts_is_refused(tmp_path: Path, local_ray: None) -> None:
    source = corpus(tmp_path / "corpus.jsonl")
    shared = tmp_path / "validation.jsonl"
    shared.write_text("".join(Path(source).read_text().splitlines(keepends=True)[:3]))
    given = table(source)
    given["sources"].append({"name": "v", "paths": [str(shared)], "format": "ultrafeedback", "role": "validation"})
    with pytest.raises(UserError, match="3 prompt"):
        run(parse_config(given), str(tmp_path / "w"), Progress())
