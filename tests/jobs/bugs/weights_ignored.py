"""The sum of weighted losses is divided by the number of samples."""

from handmade import Handmade, install


class Buggy(Handmade):
    def loss(self, batch, num_samples, *, last):
        total, _ = super().loss(batch, num_samples, last=last)
        return total, float(num_samples)


install(Buggy)
