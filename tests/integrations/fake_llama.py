"""A stand-in for ``llama_cpp``: the loop and the buffers of llama-cpp-python 0.3.36.

What matters here is kept: a processor gets a view of all evaluated ids, drafts included, and a
strided view of the logits; an error that it raises is dropped, and the token is then chosen from
the logits as they are; ``logit_bias`` uses what the list's ``extend`` returns.
"""

import types

import numpy as np
import torch


class LogitsProcessorList(list):
    pass


class Vocabulary:
    def __init__(self, token_bytes):
        self.token_bytes = token_bytes


def llama_model_get_vocab(model):
    return model


def llama_token_to_piece(vocab, id, buffer, size, lstrip, special):
    text = vocab.token_bytes[id]
    buffer[: len(text)] = text
    return len(text)


module = types.ModuleType("llama_cpp")
module.LogitsProcessorList = LogitsProcessorList
module.llama_model_get_vocab = llama_model_get_vocab
module.llama_token_to_piece = llama_token_to_piece


class Llama:
    def __init__(self, target, tokenizer, token_bytes, path="fake.gguf", draft_model=None):
        self._target, self._tokenizer = target, tokenizer
        self.model, self.model_path, self.draft_model = Vocabulary(token_bytes), path, draft_model
        self.input_ids = np.zeros(64, dtype=np.intc)
        self.scores = np.zeros((64, self.n_vocab()), dtype=np.single)
        self.n_tokens = 0
        self.dropped = []

    def n_vocab(self):
        return self._target.config.vocab_size

    def token_eos(self):
        return self._target.config.eos_token_id

    def reset(self):
        self.n_tokens = 0

    def create_completion(
        self, prompt, max_tokens=16, temperature=0.0, stream=False, logit_bias=None, **processors
    ):
        processors = processors["logits_processor"]
        if logit_bias is not None:

            def biased(input_ids, scores):
                new = np.copy(scores)
                for id, bias in logit_bias.items():
                    new[id] += bias
                return new

            processors = processors.extend([biased])
        if stream:
            return self._stream(prompt, max_tokens, processors)
        chunks = list(self._stream(prompt, max_tokens, processors))
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return {"choices": [{"text": text}]}

    def create_chat_completion(self, messages, **arguments):
        text = self.create_completion(messages[0]["content"], **arguments)["choices"][0]["text"]
        return {"choices": [{"message": {"content": text}}]}

    def _stream(self, prompt, max_tokens, processors):
        ids = list(prompt) if isinstance(prompt, list) else self._tokenizer(prompt)["input_ids"]
        self.reset()
        written = 0
        index, tokens = len(ids) - 1, list(ids)
        while True:
            self._eval(tokens)
            while index < self.n_tokens:
                token = self._sample(index, processors)
                index += 1
                if token == self.token_eos() or written == max_tokens:
                    return
                written += 1
                yield {"choices": [{"text": self._tokenizer.decode([token])}]}
                tokens = [token]
                if index < self.n_tokens and token != self.input_ids[index]:
                    self.n_tokens = index
                    break
            if self.draft_model is not None:
                known = np.append(self.input_ids[: self.n_tokens], tokens).astype(np.intc)
                tokens.extend(int(id) for id in self.draft_model(known))

    def _eval(self, tokens):
        start, self.n_tokens = self.n_tokens, self.n_tokens + len(tokens)
        self.input_ids[start : self.n_tokens] = tokens
        known = torch.from_numpy(self.input_ids[: self.n_tokens].astype(np.int64))[None]
        with torch.no_grad():
            logits = self._target(known).logits[0]
        self.scores[start : self.n_tokens] = logits[start:].numpy()

    def _sample(self, index, processors):
        layout = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True)
        data = np.zeros(self.n_vocab(), dtype=layout).view(np.recarray)
        data.logit[:] = self.scores[index]
        try:  # ctypes calls the processors
            for processor in processors or ():
                data.logit[:] = processor(self.input_ids[: self.n_tokens], data.logit)
        except Exception as error:
            self.dropped.append(error)
        return int(data.logit.argmax())
