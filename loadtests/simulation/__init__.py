"""Budgets in simulation: a model of an engine, traces of requests, policies that choose precisions, and an oracle.

``python -m loadtests.simulation --help`` tells more. Nothing here sleeps: time is a number.
"""
