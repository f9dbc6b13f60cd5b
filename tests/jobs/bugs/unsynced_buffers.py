"""Buffers are not synchronised: every rank keeps its own."""

from handmade import Handmade, install


class Buggy(Handmade):
    def finish_step(self):
        pass


install(Buggy)
