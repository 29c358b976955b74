"""CLINC150 (Larson et al. 2019): which of 150 intents a request to an assistant has. CC BY 3.0.

``clinc150`` has requests with an intent only; in ``clinc150_oos`` there are requests among them that have none of the
150, to be answered with ``out of scope``. Label words are the intents' names with spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.errors import DataError
from softprompts.tasks.formats import TextFormat, field, text_field
from softprompts.tasks.labels import LABEL_DECODING, Verbalizer
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["CLINC150", "CLINC150_OOS"]

_NAMES = """
accept_reservations account_blocked alarm application_status apr are_you_a_bot balance bill_balance bill_due
book_flight book_hotel calculator calendar calendar_update calories cancel cancel_reservation car_rental card_declined
carry_on change_accent change_ai_name change_language change_speed change_user_name change_volume confirm_reservation
cook_time credit_limit credit_limit_change credit_score current_location damaged_card date definition direct_deposit
directions distance do_you_have_pets exchange_rate expiration_date find_phone flight_status flip_coin food_last
freeze_account fun_fact gas gas_type goodbye greeting how_busy how_old_are_you improve_credit_score income
ingredient_substitution ingredients_list insurance insurance_change interest_rate international_fees
international_visa jump_start last_maintenance lost_luggage make_call maybe meal_suggestion meaning_of_life
measurement_conversion meeting_schedule min_payment mpg new_card next_holiday next_song no nutrition_info
oil_change_how oil_change_when order order_checks order_status pay_bill payday pin_change play_music plug_type
pto_balance pto_request pto_request_status pto_used recipe redeem_rewards reminder reminder_update repeat
replacement_card_duration report_fraud report_lost_card reset_settings restaurant_reservation restaurant_reviews
restaurant_suggestion rewards_balance roll_dice rollover_401k routing schedule_maintenance schedule_meeting
share_location shopping_list shopping_list_update smart_home spelling spending_history sync_device taxes tell_joke
text thank_you time timer timezone tire_change tire_pressure todo_list todo_list_update traffic transactions transfer
translate travel_alert travel_notification travel_suggestion uber update_playlist user_name vaccines w2 weather
what_are_your_hobbies what_can_i_ask_you what_is_your_name what_song where_are_you_from whisper_mode
who_do_you_work_for who_made_you yes
"""
_INTENTS = tuple(_NAMES.split())
_WORDS = tuple(name.replace("_", " ") for name in _INTENTS)
_OUT = "oos"
_LABELS = Verbalizer((*_WORDS, "out of scope"), names=(*_INTENTS, _OUT))
_FOLDER = "cls/clinc150"
_FILES = {"train": "train", "dev": "val", "test": "test"}
_HUB = {"train": "train", "dev": "validation", "test": "test"}


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``text, label``, or the hub's with ``intent``."""
    label = "intent" if "intent" in record else "label"
    if not isinstance(field(record, label), str):  # the hub's ids are in another order than the names here
        raise DataError(f"field '{label}' is {record[label]!r}, expected the name of an intent")
    return [Example(f"request: {text_field(record, 'text')}", _LABELS.word(record, label))]


def _read_in_scope(record: Mapping[str, Any], split: str) -> list[Example]:
    return [] if _OUT in (record.get("intent"), record.get("label")) else _read(record, split)


CLINC150 = register(
    Task(
        name="clinc150",
        description="the intent of a request, one of 150",
        format=TextFormat(_read_in_scope, separator="\nintent:", target_lead=" "),
        source=Source(
            local={split: f"{_FOLDER}/{file}.jsonl" for split, file in _FILES.items()},
            hub=hub_splits("clinc/clinc_oos", "plus", **_HUB),
        ),
        metrics=("accuracy",),
        selection="accuracy",
        decoding=LABEL_DECODING,
        choices=_WORDS,
    )
)
CLINC150_OOS = register(
    Task(
        name="clinc150_oos",
        description="the intent of a request, one of 150 or out of scope",
        format=TextFormat(_read, separator="\nintent:", target_lead=" "),
        source=Source(
            local={split: (f"{_FOLDER}/{file}.jsonl", f"{_FOLDER}/oos_{file}.jsonl") for split, file in _FILES.items()},
            hub=hub_splits("clinc/clinc_oos", "plus", **_HUB),
        ),
        metrics=("accuracy", "macro_f1"),
        selection="accuracy",
        decoding=LABEL_DECODING,
        choices=_LABELS.words,
    )
)
