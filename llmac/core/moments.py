"""Mean and variance of everything seen so far, one batch at a time."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.masking import masked_mean, masked_var
from llmac.core.types import AllSum, identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Running mean and variance of a stream of numbers.

    The parallel update of Chan, Golub and LeVeque 1979: with d = mean_b - mean, n' = n + n_b,

        mean' = mean + d · n_b / n'
        var'  = (var · n + var_b · n_b + d² · n · n_b / n') / n'
    """

    mean: float = 0.0
    variance: float = 1.0
    count: float = 1e-4
    """Numbers seen; the first is so small that the first batch decides."""

    @property
    def deviation(self) -> float:
        """Square root of the variance."""
        return self.variance**0.5

    def after(
        self,
        x: Float[Tensor, "*shape"],
        mask: Bool[Tensor, "*shape"],
        *,
        sum_across: AllSum = identity,
    ) -> "Moments":
        """Those with the elements of `x` that count, of all ranks together.

        Args:
            x: anything where `mask` is False.
            mask: True = counts.
            sum_across: sums over ranks.

        >>> after = Moments().after(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool))
        >>> round(after.mean, 6), round(after.variance, 6)
        (1.999933, 1.000133)
        """
        seen = float(sum_across(mask.sum().double()))
        if seen == 0:
            return self
        wide = x.double()
        mean = float(masked_mean(wide, mask, sum_across=sum_across))
        variance = float(masked_var(wide, mask, sum_across=sum_across))
        count = self.count + seen
        apart = mean - self.mean
        squares = self.variance * self.count + variance * seen
        return Moments(
            mean=self.mean + apart * seen / count,
            variance=(squares + apart**2 * self.count * seen / count) / count,
            count=count,
        )
