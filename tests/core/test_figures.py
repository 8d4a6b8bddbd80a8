"""Which figures of a run its table shows."""

from __future__ import annotations

from fedlight.core.figures import rows


def test_the_metrics_of_a_lightning_module_lead_where_there_is_no_accuracy_of_ours():
    own = {"rounds": 3, "val_f1": 0.51234, "test_loss": 1.5, "uplink_bytes": 10}
    shown = [(title, show(own[key])) for title, key, show in rows([own])]
    assert shown[:3] == [("test_loss", "1.5"), ("val_f1", "0.5123"), ("rounds", "3")]
    ours = {"val_accuracy": 0.5, "val_loss": 1.0, "rounds": 3}
    assert [title for title, _, _ in rows([ours, {}])] == ["validation accuracy", "rounds"]
