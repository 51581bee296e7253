"""Where in a network a method that adds to its layers stands: all places, or some."""

from collections.abc import Iterable, Mapping


def layers_at(places: Iterable[str] | None, layers: Mapping[str, int]) -> dict[str, int]:
  """How many layers there are at each of `places`; None is every place that the network has.

  Args:
    layers: {place: layers} of a network's configuration: `attentions` for a prefix, `sublayers`
      for adapters.

  Raises:
    ValueError: the network has no such place.
  """
  unknown = set(places or ()) - set(layers)
  if unknown:
    raise ValueError(f'Expected some of the places {tuple(layers)} of this network, got '
                     f'{", ".join(sorted(unknown))}: change `places`.')
  return {place: count for place, count in layers.items() if places is None or place in places}
