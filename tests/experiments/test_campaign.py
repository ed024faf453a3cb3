from mnist_flax.experiments.faults import campaign


def test_records_are_summed_up_by_kind_and_in_all():
    records = [
        {"kind": "SIGTERM", "statuses": [0, 0], "violations": []},
        {"kind": "SIGKILL", "statuses": [-9, 0], "violations": ["a traceback", "no summary"]},
        {"kind": "SIGTERM", "statuses": [-15], "violations": ["a traceback"]},
    ]
    columns = ("kind", "trials", "survived", "exit statuses", "amiss")
    assert [tuple(row[name] for name in columns) for row in campaign.summarise(records, "kind")] == [
        ("SIGKILL", 1, 0, "-9, 0", "a traceback; no summary"),
        ("SIGTERM", 2, 1, "-15, 0", "a traceback"),
        ("all", 3, 1, "-15, -9, 0", "a traceback; no summary"),
    ]
