"""Searching: an allocation found on the real model itself; every candidate is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitatlas.analysis.schema import (
    SOLVE_BY_DEFAULT,
    Allocation,
    Budget,
    ModelIndex,
    UserError,
    parse_format,
    resolve_pins,
)
from bitatlas.app.budgets import resolve_budget
from bitatlas.app.checks import check_text_size
from bitatlas.app.expert_groups import parse_grouping
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.app.kv_plan import cache_pairs, pair_names
from bitatlas.app.tasks.formats_to_solve import formats_to_solve
from bitatlas.app.tasks.jobs import status_dict, submit, submit_and_wait, the_jobs
from bitatlas.app.tasks.measuring import calibration_file, file_digest
from bitatlas.app.tasks.models import fit_length, register
from bitatlas.app.tasks.solving import (
    build_problem,
    default_metric,
    evidence_runs,
    expert_evidence,
    find_table,
    read_allocation,
)
from bitatlas.cache.keys import digest
from bitatlas.cache.paths import Home, write_output
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, certify, choice_of, get_searcher

__all__ = [
    "search",
    "search_candidates",
    "search_problem",
    "search_run",
    "search_tokens",
    "start_notes",
    "submit_search",
    "text_notes",
]

PRECISIONS = ("float32", "bfloat16")
Named = str | Path | Allocation


def submit_search(
    model: str | Path,
    *,
    solver: str = "path",
    metric: str | None = None,
    budget: Budget | None = None,
    bits: float | None = None,
    bytes_: str | int | None = None,
    fit: str | int | None = None,
    context: int = 0,
    batch: int = 1,
    kv_bits: float = 16,
    kv_plan: str = "",
    kv: Mapping[int, tuple[str, str]] | None = None,
    kv_layout: Mapping[str, int] | None = None,
    reserve: str | int = "256MiB",
    formats: str | tuple[str, ...] | None = None,
    pins: list[str] | Mapping[str, str] | None = None,
    target: str | None = None,
    calibration: str | Path | None = None,
    tokens: int = 65536,
    seq_len: int = 256,
    steps: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    start: Iterable[Named] = (),
    policy: str | Path | None = None,
    precision: str = "float32",
    label: str = "",
    run: str = "",
    experts: ExpertRules | None = None,
    rules_seed: int | None = None,
) -> str:
    """Start (or join) a search; returns the job's id. The same question is the same job.

    Args:
        metric: a measured one, for searches that need damages; by default the one that `solve` would take.
        budget: as it is, with the cache formats ``kv`` of each layer and, where it is not the usual one, the 16-bit window
            ``kv_layout`` (kv_block, kv_residual); or one of bits, bytes_ and fit, the last with the cache
            at ``kv_bits`` or by ``kv_plan`` (`app.kv_plan`), as in `solve`.
        tokens: the pool of calibration text; minibatches are drawn from it.
        steps: generations (rounds, steps, ...) after the first; None = the search's own default.
        settings: further settings of the search (``bitatlas solvers`` lists them).
        start: allocations to begin with.
        policy: a policy file of an earlier search, applied as it is with ``steps=0``.
        precision: ``float32`` or ``bfloat16`` for running the model; the latter is faster and blurs KLs below about 1e-3.
        label: what the allocation names as its solver. run: the measurement to use instead of the newest.
        experts: limits on groups, floors for rare experts, ties among them, as in `solve`; every candidate keeps to them.
        rules_seed: of clusters of experts; None = ``seed``.

    Raises:
        UserError: anything in it that cannot be.
    """
    kind, rules = get_searcher(solver), experts or ExpertRules()
    index = register(model)
    store = Store(Home.default())
    metrics = (metric,) if metric else SOLVE_BY_DEFAULT
    grouped = parse_grouping(rules.groups)[0] if rules.limits and rules.groups else ""
    needs = kind.NEEDS_DAMAGE or grouped == "damage"
    names, _ = formats_to_solve(store, index, formats, target, metrics, bool(metric) or needs)
    if not metric:
        usual = default_metric(store, index, names)
        # Clusters are made of the damage too, where there is one.
        known = grouped == "cluster" and store.latest_run(index.digest, usual, names) is not None
        metric = usual if needs or known else None
    if metric:
        run = run or find_table(store, index, metric, names).run
        store.run(run)
    text = calibration_file(index.path, calibration)
    if text is None:
        raise UserError(
            "searching needs a calibration text", found="none was named", fix="--calibration FILE"
        )
    check_text_size(tokens, seq_len)
    fit_length(index, seq_len)
    if precision not in PRECISIONS:
        raise UserError("no such precision", found=precision, fix=f"one of {', '.join(PRECISIONS)}")
    chosen = dict(settings or {}) | ({} if steps is None else {"steps": steps})
    checked = kind.checked(chosen)
    if budget is None:
        pairs = cache_pairs(index, kv_bits, kv_plan)
        least = int(index.bytes_table([parse_format(f) for f in names]).min(axis=1).sum()) + index.kept_bytes
        budget = resolve_budget(index, bits=bits, bytes_=bytes_, fit=fit, context=context, batch=batch, reserve=reserve, kv=pairs, smallest=least)  # fmt: skip
        kv = pair_names(pairs)
    pinned = dict(pins) if isinstance(pins, Mapping) else resolve_pins(pins or [], index.unit_keys())
    starts = []
    for item in start:
        allocation = item if isinstance(item, Allocation) else read_allocation(item)
        allocation.check_model(index)
        outside = sorted(set(allocation.formats.values()) - {*names, *pinned.values()})
        if outside:
            raise UserError("an allocation to begin with has formats outside the search", found=", ".join(outside), fix="--formats")  # fmt: skip
        starts.append(store.put_allocation(allocation))
    if policy is not None and not (kind.HAS_POLICY and Path(policy).is_file()):
        raise UserError("this policy cannot be used", found=f"{policy} for {kind.NAME}", fix="a .safetensors file that `bitatlas search --solver ramp` left")  # fmt: skip
    params = {
        "model": index.path, "digest": index.digest, "solver": kind.NAME, "metric": metric or "", "run": run,
        "formats": list(names), "pins": pinned, "target": target or "", "budget": asdict(budget),
        "limit_bytes": budget.weights_bytes - index.kept_bytes, "calibration": str(text), "calibration_sha": file_digest(text),
        "tokens": tokens, "seq_len": seq_len, "seed": seed, "start": starts, "label": label or kind.NAME,
        "precision": precision, "kv": {str(i): list(pair) for i, pair in (kv or {}).items()},
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in checked.items()},
        "policy": str(Path(policy).resolve()) if policy else "", "policy_sha": file_digest(Path(policy)) if policy else "",
    } | ({"kv_layout": dict(kv_layout)} if kv_layout else {})  # fmt: skip
    if rules:
        # With the measurements that groups are made of now: a search that goes on later has the same groups.
        params |= rules.settings() | {"rules_seed": seed if rules_seed is None else rules_seed, "evidence": evidence_runs(store, index)}  # fmt: skip
    kind.check(search_problem(params, index, Home.default()))  # now rather than in the job
    return submit("search", params, f"{kind.TITLE} on {index.name}, {budget.label or 'as given'}")


def search_problem(params: Mapping[str, Any], index: ModelIndex, home: Home) -> Problem:
    """The problem of a search's parameters."""
    formats, table, limits = tuple(params["formats"]), None, None
    if params["run"]:
        table = Store(home).table(params["run"], params["metric"], index.unit_keys()).select(formats)
    if params["target"]:
        from bitatlas.app.targets import get_target
        from bitatlas.app.targets.limits import limits_of

        limits = limits_of(get_target(params["target"]), index, formats)
    rules = ExpertRules.of(params.get("experts"))
    ties = expert_ties(index, rules.ties)
    problem = build_problem(index, table, formats, params["limit_bytes"], params["pins"], limits, ties)
    if rules:
        known = expert_evidence(Store(home), index, table, params["evidence"])
        problem = under_rules(problem, index, known, rules, params["metric"], params["rules_seed"])
    return problem


def search_run(params: Mapping[str, Any]) -> str:
    """The run that a search's candidates belong to in the store."""
    return "search-" + digest(dict(params))


def search(
    model: str | Path,
    *,
    output: str | Path | None = None,
    wait: bool = True,
    on_progress: Callable[[Any], None] | None = None,
    **options: Any,
) -> Allocation | dict[str, Any]:
    """`submit_search` with ``options``; with ``wait`` the allocation found (written to ``output``), else the job's status."""
    job = submit_search(model, **options)
    status = submit_and_wait(job, wait, on_progress)
    if not wait:
        return status_dict(status)
    found = Store(Home.default()).allocation((status.result or {})["allocation"])
    if output is not None:
        write_output(output, found.to_json().encode())
    return found


def search_tokens(
    solver: str = "path", *, tokens: int = 65536, steps: int | None = None, settings: Mapping[str, Any] | None = None, starts: int = 0
) -> int | None:  # fmt: skip
    """Forward-equivalent tokens that a search takes at most; None where the search cannot tell. The names are `submit_search`'s.

    Raises:
        UserError: no such search, or settings that it does not have.
    """
    kind = get_searcher(solver)
    chosen = kind.checked(dict(settings or {}) | ({} if steps is None else {"steps": steps}))
    return kind.most_tokens(chosen, starts, tokens)


def text_notes(solver: str, tokens: int, settings: Mapping[str, Any], starts: int = 0) -> list[str]:
    """What a pool of ``tokens`` does to a search's schedule: nothing, or which text is cut short, in words."""
    kind = get_searcher(solver)
    longest = kind.longest_text(kind.checked(settings), starts)
    if longest <= tokens:
        return []
    return [f"{kind.TITLE} asks for texts of {longest:,} tokens and the pool has {tokens:,}: its longest stages read the whole pool, "
            f"the same text each time; --tokens {longest} where the text has as many, or a shorter schedule"]  # fmt: skip


def start_notes(problem: Problem, names: Iterable[str], store: Store) -> list[str]:
    """Why allocations to begin with were left out: one note for each that breaks a limit of the search's own problem."""
    out = []
    for key in names:
        proof = certify(problem, choice_of(problem, store.allocation(key).formats))
        if not proof.feasible:
            out.append(f"an allocation to begin with was left out: {proof.violations[0]}")
    return out


def search_candidates(job: str) -> list[dict[str, Any]]:
    """Every candidate that a search has scored so far, in the order of what had been spent.

    Returns:
        step, forward_equivalents (spent by then), payload_bytes, kl, kl_stderr, tokens (it was scored on), choice.
    """
    rows = Store(Home.default()).candidates(search_run(the_jobs().job(job).params))
    out = []
    for c in rows:
        extra = c.extra or {}
        out.append({"step": extra.get("step"), "forward_equivalents": extra.get("forward_equivalents"),
                    "payload_bytes": c.payload_bytes, "kl": c.objective, "kl_stderr": extra.get("stderr"),
                    "tokens": c.tokens, "choice": extra.get("choice")})  # fmt: skip
    return sorted(out, key=lambda r: (r["forward_equivalents"] or 0, r["kl"]))
