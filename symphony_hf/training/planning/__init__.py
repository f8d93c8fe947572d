"""Requirements of a recipe before it runs: memory by part, largest micro-batch, tokens, hours. Loads no weights."""

from .launches import Launch, read_launches
from .memory import Memory, States, memory_of, states_of
from .plan import Machine, Plan, PlanRow, accelerate_folder, plan_recipe
from .step import MetaStep, StepBytes, meta_model
from .tables import parse_bytes, print_plan

__all__ = [
    "Launch",
    "Machine",
    "Memory",
    "MetaStep",
    "Plan",
    "PlanRow",
    "States",
    "StepBytes",
    "accelerate_folder",
    "memory_of",
    "meta_model",
    "parse_bytes",
    "plan_recipe",
    "print_plan",
    "read_launches",
    "states_of",
]
