"""Inspection of a model: parameters by part, active parameters per token, data types and routers."""
