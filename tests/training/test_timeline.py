"""What happens at which step, in words and in order."""

from tersor.training.timeline import Event, Timeline


def test_events_are_told_in_the_order_in_which_they_happen():
    timeline = Timeline.of(
        [
            Event("calibrates", None, compressor="P"),
            Event("rounds", 5, every=1, compressor="Q"),
            Event("prunes", 0, compressor="L"),
            Event("learns", 0, 8, 2, compressor="M"),
        ]
    )
    assert str(timeline).splitlines() == [
        "at the start               L: prunes",
        "every 2 steps, 0 to 8      M: learns",
        "every step from step 5 on  Q: rounds",
        "at the end                 P: calibrates",
    ]
    assert timeline.to_dict()["events"][2] == {
        "action": "rounds",
        "first": 5,
        "last": None,
        "every": 1,
        "compressor": "Q",
        "when": "every step from step 5 on",
    }
    assert str(Timeline.of([])) == ""
