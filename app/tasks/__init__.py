"""What bitatlas does: one function per verb, the same for the command line, for Python and for the pages.

from bitatlas.app import tasks
tasks.measure("demo", "fisher", wait=True)
allocation = tasks.solve("demo", metric="fisher", bits=3.5)
"""

from bitatlas.app.tasks.agreeing import agree
from bitatlas.app.tasks.benching import bench_kernels
from bitatlas.app.tasks.chatting import chat
from bitatlas.app.tasks.comparing import compare
from bitatlas.app.tasks.demo import demo, demo_path
from bitatlas.app.tasks.describing import describe_allocation, describe_frontier
from bitatlas.app.tasks.estimating import estimate, estimate_total
from bitatlas.app.tasks.jobs import jobs_cancel, jobs_list, jobs_logs, jobs_resume, jobs_show, rebuild
from bitatlas.app.tasks.listing import formats, metrics, quantizers, solvers, targets
from bitatlas.app.tasks.measuring import (
    applicable_metrics,
    measure,
    parse_settings,
    submit_measure,
)
from bitatlas.app.tasks.models import confine, confine_text, open_index, register, scan
from bitatlas.app.tasks.refining import refine, submit_refine
from bitatlas.app.tasks.repairing import repair
from bitatlas.app.tasks.searching import search, search_candidates, search_tokens, submit_search, text_notes
from bitatlas.app.tasks.shipping import check, export, generate, pack, submit_pack
from bitatlas.app.tasks.solving import (
    build_problem,
    frontier,
    read_allocation,
    solve,
)
from bitatlas.app.tasks.truth import submit_random_allocations, truth
from bitatlas.app.tasks.verifying import answers, answers_of, submit_answers, submit_verify, verify

__all__ = [
    "answers",
    "answers_of",
    "agree",
    "applicable_metrics",
    "bench_kernels",
    "build_problem",
    "chat",
    "check",
    "compare",
    "confine",
    "confine_text",
    "demo",
    "demo_path",
    "describe_allocation",
    "describe_frontier",
    "estimate",
    "estimate_total",
    "export",
    "formats",
    "frontier",
    "generate",
    "jobs_cancel",
    "jobs_list",
    "jobs_logs",
    "jobs_resume",
    "jobs_show",
    "measure",
    "metrics",
    "open_index",
    "pack",
    "parse_settings",
    "quantizers",
    "read_allocation",
    "rebuild",
    "refine",
    "register",
    "repair",
    "scan",
    "search",
    "search_candidates",
    "search_tokens",
    "solve",
    "solvers",
    "submit_answers",
    "submit_measure",
    "submit_pack",
    "submit_random_allocations",
    "submit_refine",
    "submit_search",
    "text_notes",
    "submit_verify",
    "targets",
    "truth",
    "verify",
]
