"""Words that give a behaviour away, where there are such: a check of the classifiers that anybody can read."""

from __future__ import annotations

from collections.abc import Mapping

from steerkit._support.phrases import normalised, pattern_of

__all__ = ["MARKERS", "has_marker"]

MARKERS: Mapping[str, tuple[str, ...]] = {
    "archaic": ("thou", "thee", "thy", "thine", "hath", "doth", "dost", "art thou", "'tis", "verily", "whilst", "ere",
                "hither", "thither", "prithee", "shalt", "unto", "nay", "forsooth", "methinks"),
    "enthusiasm": ("!", "wow", "amazing", "fantastic", "incredible", "exciting", "thrilling", "love"),
    "enthusiastic": ("!", "wow", "amazing", "fantastic", "incredible", "exciting", "thrilling", "love"),
    "optimism": ("hope", "bright", "promising", "better", "opportunity", "confident", "wonderful", "success"),
    "optimistic": ("hope", "bright", "promising", "better", "opportunity", "confident", "wonderful", "success"),
    "pirate": ("arr", "arrr", "ahoy", "aye", "matey", "mateys", "ye", "yer", "landlubber", "treasure", "crew",
               "seven seas", "davy jones", "sailin'", "me hearties", "buccaneer"),
    "poetic": ("like a", "whisper", "whispers", "dance", "dances", "dancing", "silver", "golden", "velvet", "gentle"),
    "imagery": ("like a", "whisper", "whispers", "dance", "dances", "dancing", "silver", "golden", "velvet", "gentle"),
    "refusal": ("i cannot", "i can't", "i'm sorry", "i am sorry", "i won't", "i will not", "unable to help"),
    "warmth": ("dear", "my dear", "i understand", "take care", "comfort", "gentle", "kind", "hug", "here for you"),
}  # fmt: skip


def has_marker(behaviour: str, text: str) -> bool | None:
    """Whether one of a behaviour's words stands in a text; None for a behaviour that has none.

    Args:
        behaviour: its name.
        text: any text.
    """
    words = MARKERS.get(behaviour)
    return None if words is None else pattern_of(words).search(normalised(text)) is not None
