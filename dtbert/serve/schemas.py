"""What the service takes and gives, as Pydantic models: OpenAPI is made of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

_QUESTION = "Who wrote the letter?"
_TEXT = "The letter that Ada Lovelace wrote in 1843 is lost."
_SCHEDULE: dict[str, Any] = {
    "kind": "ratios",
    "length_config": [1, 1, 0.9, 0.6, 0.4, 0.2],
    "scorer": "answer_overlap",
    "keep_question": True,
}

Question = Annotated[str, Field(description="At most as long as a window leaves room for.", examples=[_QUESTION])]
Context = Annotated[str, Field(description="A text of any length within the service's limit.", examples=[_TEXT])]
# Strict: true is no number, nor is "0.5".
Budget = Annotated[float, Field(gt=0, le=1, strict=True)]


class _Model(BaseModel):
    # A misspelt option is an error: it must not be passed over in silence.
    model_config = ConfigDict(extra="forbid")


class Spending(_Model):
    """How much work an answer may take, and how much time."""

    budget: Budget | None = Field(
        default=None,
        description="The part of the full model's work that may be spent in the mean; by default all.",
    )
    schedule: dict[str, Any] | list[float] | None = Field(
        default=None,
        description="Instead of a budget: tokens that each layer keeps, as the `to_dict` of a policy has it, or a list "
        "with one entry per layer, whole numbers of tokens or parts of the text. It is used as it is, under any load.",
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        description="Milliseconds after which the answer is of no use, within the service's limit.",
    )


class Asking(Spending):
    """What may be said beside the texts."""

    top_k: int = Field(default=1, ge=1, le=100, strict=True, description="The best answers, of distinct text.")
    overlap: bool = Field(
        default=False, strict=True, description="Whether answers may share characters with better ones."
    )
    no_answer: bool = Field(default=False, strict=True, description='Whether the answer may be that there is none, "".')
    threshold: Annotated[FiniteFloat, Field(strict=True)] | None = Field(
        default=None, description="Margin below which there is no answer, with `no_answer`; by default the model's own."
    )


class Document(_Model):
    """A text with a name."""

    text: Context
    name: str | None = Field(default=None, max_length=1000, description="By default its number, from 0.")


class AnswerRequest(Asking):
    """A question about one context, or about several documents."""

    question: Question
    context: Context | None = None
    documents: list[Document] | None = Field(default=None, min_length=1, description="Instead of a context.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"question": _QUESTION, "context": _TEXT},
                {"question": _QUESTION, "context": _TEXT, "top_k": 3, "budget": 0.5, "no_answer": True},
                {
                    "question": "When was it written?",
                    "documents": [
                        {"name": "letters.txt", "text": _TEXT},
                        {"name": "notes.txt", "text": "The notes of 1842 are longer."},
                    ],
                    "top_k": 2,
                },
                {"question": _QUESTION, "context": _TEXT, "schedule": _SCHEDULE, "deadline_ms": 500},
            ]
        },
    )

    @model_validator(mode="after")
    def _texts(self) -> "AnswerRequest":
        if (self.context is None) == (self.documents is None):
            raise ValueError("give either `context`, a text, or `documents`, a list of them")
        return self


class Pair(_Model):
    """A question about a context."""

    question: Question
    context: Context
    id: str | int | None = Field(default=None, description="Given back with the answer.")


class AnswersRequest(Asking):
    """Many questions, each about its own context."""

    questions: list[Pair] = Field(min_length=1)

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "questions": [
                        {"id": "a", "question": _QUESTION, "context": _TEXT},
                        {"id": "b", "question": "When did she write it?", "context": _TEXT},
                    ],
                    "budget": 0.5,
                }
            ]
        },
    )


class TraceRequest(Spending):
    """A question about a context, of which each layer's choice is wanted."""

    question: Question
    context: Context

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"question": _QUESTION, "context": _TEXT, "budget": 0.5}]},
    )


class AnswerOut(BaseModel):
    """A span of the text; that there is no answer is "" from 0 to 0."""

    text: str = Field(examples=["Ada Lovelace"])
    start: int = Field(description="Characters of the context before it.", examples=[16])
    end: int = Field(description="The first character after it.", examples=[28])
    score: float = Field(description="Its probability among all spans and that there is no answer.", examples=[0.97])
    margin: float = Field(description="The logarithm of its odds against that there is no answer.", examples=[5.1])
    document: str | int | None = Field(default=None, description="Name or number of the document that has it.")


class Used(BaseModel):
    """What was spent."""

    budget: float | None = Field(description="That chose the schedule; null is the full model, or a schedule given.")
    schedule: dict[str, Any] | None = Field(description="What said how many tokens a layer keeps; null: all.")
    work: float = Field(description="Executed multiply-accumulates over the full model's, of these texts.")
    shed: bool = Field(description="Whether the budget is smaller than was asked for, because of the load.")
    waited_ms: float = Field(description="Until the model began.")
    total_ms: float = Field(description="From the request's arrival to its answer.")


class AnswerResponse(BaseModel):
    """The best answers, best first; fewer than `top_k` where the texts have no more."""

    answers: list[AnswerOut]
    used: Used


class PairAnswers(BaseModel):
    """The answers to one of many questions, or why there are none."""

    id: str | int | None = None
    answers: list[AnswerOut] = []
    error: str | None = Field(default=None, description="What is wrong with this question or its context.")


class AnswersResponse(BaseModel):
    """One entry per question, in order."""

    results: list[PairAnswers]
    used: Used


class TraceResponse(BaseModel):
    """What each layer kept of each window of the text."""

    trace: dict[str, Any] = Field(description="As `dtbert.Trace.to_dict` has it.")
    used: Used


class Limits(BaseModel):
    """What a request may be."""

    max_body: int = Field(description="Bytes.")
    max_context: int = Field(description="Characters of a text.")
    max_documents: int = Field(description="Documents, or questions, of a request.")
    deadline_ms: int


class FrontPoint(BaseModel):
    """A schedule that was measured, or a policy by which the text decides, as its `kind` says; null is the full model.

    Its work is a part of the full model's, in the mean, and F1 in percent.
    """

    schedule: dict[str, Any] | None
    work: float
    f1: float


class ModelResponse(BaseModel):
    """The model, what it was measured to do, and the limits of the service."""

    name: str
    version: str = Field(description="Of dtbert.")
    device: str
    dtype: str
    backend: str
    layers: int
    hidden_size: int
    window: int = Field(description="Tokens that are read at a time.")
    stride: int
    threshold: float
    front: list[FrontPoint] = Field(description="What a budget chooses from, the cheapest first.")
    measured_on: str | None = Field(description="The questions of the front's F1.")
    limits: Limits


class HealthResponse(BaseModel):
    """Whether the service is well."""

    status: Literal["ok"] = "ok"


class ProblemDocument(BaseModel):
    """An error, by RFC 9457."""

    type: str = Field(description="Where the kind of problem is explained.", examples=["/problems#queue-full"])
    title: str
    status: int
    detail: str = Field(description="What came, what was expected, what to do.")
    advice: str = Field(description="What to do about this kind of problem.")
    errors: list[dict[str, str]] | None = Field(default=None, description="Each field that is wrong, by JSON pointer.")
