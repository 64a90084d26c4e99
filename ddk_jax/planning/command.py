"""What `ddk plan` does: plan, search, suggest, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ddk_jax.config import Config
from ddk_jax.errors import DoesNotFitError, UserError
from ddk_jax.parallel.compiled import Level
from ddk_jax.planning.job import PlannedJob, with_settings
from ddk_jax.planning.plan import Plan, make_plan
from ddk_jax.planning.report import plan_json, plan_text, search_json, search_text
from ddk_jax.planning.search import Found, candidates, remedies, search
from ddk_jax.planning.slices import open_slice

Print = Callable[[str], Any]


def run_plan(
    config: Config,
    topology: str,
    *,
    level: Level,
    searching: bool,
    as_json: bool,
    out: Print,
    progress: Print,
) -> None:
    """Plan a config for a slice, and print the plan.

    Args:
      config: the run.
      topology: the slice.
      level: how hard the compiler tries.
      searching: look for the fastest layout first, and plan that.
      as_json: print one JSON object.
      out: takes the result.
      progress: takes lines on what is being compiled.

    Raises:
      DoesNotFitError: the config, or every layout of it, needs more memory than there is.
      UserError: see `make_plan`.
    """
    if not topology:
        raise UserError("say for which slice: --topology v5e:4x4; `ddk plan --list` names them")
    planner = partial(make_plan, level=level)
    found = None
    if searching:
        found = _search(config, topology, level, progress)
        if not as_json:
            out(search_text(found))
        if found.best is None:
            if as_json:
                out(json.dumps({"fits": False, "search": search_json(found)}))
            raise DoesNotFitError(f"no layout that was tried fits {topology}")
        config = with_settings(config, **found.best.candidate.settings())
    plan = planner(config, topology)
    helps = [] if plan.fits or searching else remedies(config, plan, planner, progress)
    if as_json:
        tree = plan_json(plan, helps)
        out(json.dumps(tree if found is None else tree | {"search": search_json(found)}))
    else:
        out(plan_text(config.run.dir, plan, helps))
    if not plan.fits:
        raise DoesNotFitError(f"{config.run.dir} does not fit {topology}")


def _search(config: Config, topology: str, level: Level, progress: Print) -> Found:
    """The fastest layout whose evaluations fit too."""
    chip, devices = open_slice(topology)
    alone = replace(config.mesh, data=-1, fsdp=1, tensor=1)
    job = PlannedJob(replace(config, mesh=alone), devices)
    heads = [spec.num_heads for spec in (job.student.spec, *job.teachers.specs)]
    options = list(candidates(config, len(devices), heads))
    if not options:
        raise UserError(
            f"train.rows_per_step = {config.train.rows_per_step}: no mesh of {len(devices)} chips "
            "can share so many rows"
        )
    planner: Callable[[Config, str], Plan] = partial(make_plan, level=level, train_only=True)
    return search(config, topology, chip, options, planner, progress)
