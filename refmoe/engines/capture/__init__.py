"""Record what another engine computes, under the names of the taps."""
