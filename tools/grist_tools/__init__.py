"""Command lines over finished parts: look at data, plan a run, draw curves, generate, chat, export, measure.

Each is a module to run: `python -m grist_tools.generate DIR --prompt "..."`. Nothing in the house imports these.
"""
