"""Which device owns which blocks of curvature: a plan from the sides of their factors alone.

By the longest processing time first on `d_A^3 + d_G^3` (Graham, 1969: at most `4/3 - 1/3n` of the
least possible largest load).
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from fop_optax.curvature.stacks import Stack


class Owners(NamedTuple):
  """Where blocks are; places count along the leading axis of the arrays of a stack."""

  slots: tuple[int, ...]  # of each stack, on every device
  places: tuple[tuple[int, ...], ...]  # of each stack: for each block device * slots + slot
  loads: tuple[int, ...]  # of each device: the sum of d^3 over the sides of its blocks


@functools.cache
def plan_owners(stacks: tuple[Stack, ...], devices: int) -> Owners:
  """Owners of the blocks of all stacks: the longest first, each to who has least to do.

  A slot costs every device its bytes, and at every step its products, so blocks are dealt once
  more: each to a device that, if there is one, need not have more slots than others have; among
  those to who has least to do, then the fewest entries, then to the first. That is taken if the
  largest load stays within that of the first deal, or 4/3 of the mean.
  """
  first = _deal(stacks, devices, None)
  bound = max(*first.loads, 4 * sum(first.loads) // (3 * devices))
  again = _deal(stacks, devices, bound)
  return again if max(again.loads) <= bound else first


def _deal(stacks: Sequence[Stack], devices: int, bound: int | None) -> Owners:
  """To who has least to do, or within `bound` to who needs no new slot."""
  sides = [list(zip(stack.dims, stack.diagonal, strict=True)) for stack in stacks]
  time, entries = (
    [sum(d if diagonal else d**power for d, diagonal in own) for own in sides] for power in (3, 2)
  )
  owned: list[list[list[int]]] = [[[] for _ in range(devices)] for _ in stacks]
  loads, sizes, slots = [0] * devices, [0] * devices, [0] * len(stacks)
  for k in sorted(range(len(stacks)), key=lambda k: (-time[k], -entries[k])):
    for b in range(stacks[k].blocks):

      def rank(device, k=k):
        new_slot = len(owned[k][device]) == slots[k]
        beyond = bound is not None and loads[device] + time[k] > bound
        return beyond, new_slot and bound is not None, loads[device], sizes[device]

      device = min(range(devices), key=rank)
      loads[device] += time[k]
      sizes[device] += entries[k]
      owned[k][device].append(b)
      slots[k] = max(slots[k], len(owned[k][device]))
  places = tuple(tuple(_places(own, most)) for own, most in zip(owned, slots, strict=True))
  return Owners(tuple(slots), places, tuple(loads))


def _places(owned: Sequence[Sequence[int]], slots: int) -> list[int]:
  """For each block where it is, of the blocks that each device owns."""
  found = {
    b: device * slots + slot for device, own in enumerate(owned) for slot, b in enumerate(own)
  }
  return [found[b] for b in range(len(found))]
