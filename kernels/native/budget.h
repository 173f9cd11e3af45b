// The budget machine and a slot's counters; headrace.engine.reasoning specifies the machine, kernels/sampling.py this form.
#pragma once

#include <algorithm>

#include "ops.h"

namespace headrace {

enum Phase : int64_t { OFF = 0, THINKING = 1, CLOSING = 2, ANSWERING = 3 };
enum Finish : int64_t { RUNNING = 0, STOP = 1, LENGTH = 2, ERROR = 3 };

struct Budget {
    const SampleArgs& a;
    const int64_t slot;

    // Whether the next token is an id of the closing; a model without a closing forces nothing.
    bool forces() const { return a.closing_count && closing(); }

    // The id that the machine dictates, if it does.
    int64_t closing_id() const { return a.control[3 + a.eos_count + std::min(ids_out(), a.closing_count - 1)]; }

    // Accounts for ``token``, decided by whichever way: moves machine and counters, returns the slot's Finish.
    Finish advance(int64_t token) const {
        const int64_t think = a.control[0], end_think = a.control[1], tool_call = a.control[2];
        const int64_t phase = a.phase[slot], out = ids_out() + 1;
        const bool forced = closing(), free = phase == THINKING && a.remaining[slot];
        const bool closed =
            (forced && out >= a.closing_count) || (free && (token == end_think || token == tool_call));
        if (phase == ANSWERING && token == think)
            a.phase[slot] = THINKING;
        else if (closed)
            a.phase[slot] = ANSWERING;
        else if (forced)
            a.phase[slot] = CLOSING;
        if (free && !closed && a.remaining[slot] > 0) --a.remaining[slot];
        a.cursor[slot] = forced && !closed ? out : 0;
        a.last_token[slot] = token;
        ++a.length[slot];
        const int64_t left = --a.tokens_left[slot];
        // A forced id that happens to be an end-of-sequence id is part of the closing, not an end.
        const int64_t *eos = a.control + 3, *last = eos + a.eos_count;
        if (!a.ignore_eos[slot] && !forced && std::find(eos, last, token) != last) return STOP;
        return left <= 0 ? LENGTH : RUNNING;
    }

private:
    // Closing, or thinking with nothing left.
    bool closing() const {
        return a.phase[slot] == CLOSING || (a.phase[slot] == THINKING && a.remaining[slot] == 0);
    }
    // Ids of a closing that are out already: none of one that begins now.
    int64_t ids_out() const { return a.phase[slot] == THINKING ? 0 : a.cursor[slot]; }
};

}  // namespace headrace
