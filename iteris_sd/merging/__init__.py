"""Merging methods: pure functions of adapters and moments, listed in a registry that needs no torch."""

from .registry import METHODS, Method, Parameter, find

__all__ = ["METHODS", "Method", "Parameter", "find"]
