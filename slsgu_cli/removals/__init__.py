"""Removal requests: a recipe describes a job, a run works through it, a ledger records it.

Everything here calls the public Python interface of slsgu and nothing below it.
"""
