"""Launcher `ray`: one actor on each node of a Ray cluster, which starts one node agent."""
