"""What the judge of an hour's readings finds."""

from typing import Any

from bench.service.soak import grown, growth


def readings(memory: list[int], descriptors: list[int]) -> list[dict[str, Any]]:
    return [
        {"seconds": 30.0 * n, "processes": [{"bytes": m, "threads": 5, "descriptors": d}]}
        for n, (m, d) in enumerate(zip(memory, descriptors, strict=True))
    ]


def test_what_settles_in_the_first_half_is_no_growth() -> None:
    (row,) = growth(readings([100, 900, 1000, 1000, 1001, 999], [7, 9, 7, 7, 8, 9]))
    assert grown([row], clients=1) == []


def test_memory_that_still_grows_is_found() -> None:
    (row,) = growth(readings([1000, 1000, 1000, 1000, 1020, 1040], [7] * 6))
    assert grown([row], clients=1) == ["rank 0: 4.0% more memory"]
    assert round(row["bytes_an_hour"]) == 2400


def test_descriptors_that_stay_are_found() -> None:
    (row,) = growth(readings([1000] * 6, [7, 8, 8, 9, 10, 11]))
    assert grown([row], clients=2) == ["rank 0: 11 descriptors, 8 before"]
