"""The parts of the daemon that handlers use. aiosd.kernel builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiosd.access.audit import Audit
from aiosd.context.contexts import Contexts
from aiosd.context.interception import Interception
from aiosd.context.residency import Residency
from aiosd.cores.models import Models
from aiosd.cores.pool import Pool
from aiosd.database.store import Store
from aiosd.handlers.tool.approvals import Approvals
from aiosd.handlers.tool.questions import Questions
from aiosd.host.accounts import Accounts
from aiosd.scheduler.admission import Admission
from aiosd.scheduler.demand import Demand
from aiosd.scheduler.dispatch import Dispatch
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.handler import Handler
from aiosd.scheduler.kvbudget import KvBudget
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.names import Names
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.scheduler import Scheduler
from aiosd.tools.calls import Calls
from aiosd.tools.catalog import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    handlers: Mapping[str, Handler]  # all handlers, by kind
    accounts: Accounts
    admission: Admission
    approvals: Approvals
    audit: Audit
    calls: Calls
    contexts: Contexts
    demand: Demand
    dispatch: Dispatch
    ending: Ending
    interception: Interception
    kv_budget: KvBudget
    limits: Limits
    models: Models
    names: Names
    notices: Notices
    pool: Pool
    questions: Questions
    residency: Residency
    scheduler: Scheduler
    store: Store
    tools: Tools
