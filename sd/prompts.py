"""The two prompts that the whole method is about: the student's and the self-teacher's.

The student sees the problem x, the self-teacher sees x and a context c. Both prompts end in the
same way, so that both models score the same continuation, position by position. The embedded solver
has a token for each part of a prompt:

    student   <problem> 7*8 + 6*9 <solution>                                    | completion …
    teacher   <problem> 7*8 + 6*9 <critique> <step_1> … </answer> <solution>    | completion …

Chat models get one user turn, in ChatML or in Llama 3's format, as their chat template says; a
thought only if the template has one:

    student   <|im_start|>user⏎ problem, instruction <|im_end|>⏎
              <|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎                         | completion …
    teacher   <|im_start|>user⏎ problem, context, instruction <|im_end|>⏎
              <|im_start|>assistant⏎<think>⏎ THOUGHT ⏎</think>⏎⏎                | completion …

The student's thinking is off: an empty thought, as in Qwen3's own template. The teacher's thinking
is on. A teacher that still expected a thought would call the first token of every rollout wrong, so
its thought is one fixed sentence, already closed.

Control tokens are put in by id, and texts are encoded with all of the tokenizer's control tokens
switched off. A problem or critique that spells `<|im_start|>` can therefore never become one.
"""
from sd import UserError
from sd.llm.tokenizer import Tokenizer

CONTEXT_TAGS = {"ref": "<reference>", "critique": "<critique>"}
INTRODUCTION = {"ref": "Here is a reference solution:",
                "critique": "Here is your attempt, corrected step by step by a teacher:"}
INSTRUCTION = ("Solve the problem. Write your reasoning as numbered steps, each in its own tags: "
               "<step_1> … </step_1>, <step_2> … </step_2> and so on. "
               "Then write the final answer alone as <answer> … </answer>.")
NO_THOUGHT = "\n\n"
THOUGHT = "\nI have read what I was shown. Now I write my own solution, step by step.\n"


def student_prompt(tokenizer: Tokenizer, problem: str) -> list[int]:
    """Token ids of the prompt that shows the problem alone.

    Raises UserError if the tokenizer is the embedded solver's and lacks one of its prompt tokens or
    does not know the problem's characters, or if it lacks a control token of its chat template.
    """
    if tokenizer.chat_model:
        return tokenizer.chat(f"{problem}\n\n{INSTRUCTION}", NO_THOUGHT)
    ids = tokenizer.encode(problem)
    if tokenizer.unknown in ids:
        raise UserError(f"{tokenizer.path}: does not know all characters of the problem "
                        f"{problem[:60]!r}; the embedded solver reads only sums of products")
    return [tokenizer.control("<problem>"), *ids, tokenizer.control("<solution>")]


def teacher_prompt(tokenizer: Tokenizer, problem: str, kind: str, context: str) -> list[int]:
    """Token ids of the prompt that also shows a context; `kind` says which: ref or critique."""
    if tokenizer.chat_model:
        user = f"{problem}\n\n{INTRODUCTION[kind]}\n\n{context}\n\n{INSTRUCTION}"
        return tokenizer.chat(user, THOUGHT)
    return [tokenizer.control("<problem>"), *tokenizer.encode(problem),
            tokenizer.control(CONTEXT_TAGS[kind]), *tokenizer.encode(context),
            tokenizer.control("<solution>")]
