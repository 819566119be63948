// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "host/scheduler_memory.h"

namespace gemma_ext::host {

// When queued work may join what runs.
enum class Mode {
  kDepth,     // at every loop: continuous depth-wise batching, cdb
  kSequence,  // at every full pass, and no token leaves before its last loop: csb
  kLockstep,  // when every token of the pass has left, at whatever loop
  kStatic,    // when every request of the batch has ended
};
// Who supplies keys and values of the loops that a token did not run.
enum class Fills {
  kNone,   // nobody: a later token reads another loop's, or skips the token
  kWrite,  // the runner, when the token leaves
  kLazy,   // the token itself, in the step in which a later one needs them
  kEager,  // as kLazy, or earlier in rows that are free
};
enum class Pressure { kNone, kReserve, kRecompute, kOffload };
enum class Order { kFifo, kDeepest, kUniform };
enum class Publish { kNone, kPrompt, kAll };
enum class Stage { kIdle, kBlock, kCoda, kScore, kOffload, kRestore, kTick };
enum class Kind { kCurrent, kFill, kPrompt };
enum class End { kNo, kStop, kLength, kMemory };

struct Options {
  int loops = 1;          // B
  int width = 1;          // tokens in a step at most, W
  int fill_rows = 0;      // rows for fills beyond W
  int requests = 1;       // that hold a block-table row at a time, R
  int slots = 1;          // of the bank of hidden states
  int pages = 1;          // of the pool
  int request_pages = 1;  // of one request at most
  int backlog = 64;       // unfilled tokens of a request at most
  int prefill = 1;        // prompt rows in a step at most
  bool mixed = true;      // prompt rows share steps with tokens, else they take turns
  bool aligned = false;   // loops share places: prompt chunks end at multiples of `prefill`
  int min_coda = 1;       // tokens that wait for the head until it runs, unless nothing else can
  int min_rows = 1;       // free block-table rows before requests are admitted
  double margin = 0;      // share of the pages that admission leaves free
  Mode mode = Mode::kDepth;
  Fills fills = Fills::kLazy;
  Pressure pressure = Pressure::kReserve;
  Order order = Order::kFifo;
  Publish publish = Publish::kNone;
  bool fill_on_finish = false;
  bool verify = false;  // every step: that all keys it reads are there
  // Tokens are routed where the model runs: the scheduler plans prompts and memory, and hears of
  // tokens later. `ahead`: positions of a request that may run before it hears of them.
  bool device = false;
  int ahead = 2;
  int prefix =
      0;  // tokens at the begin of every prompt that the runner fills in before its first rows
  int drafts = 0;  // tokens that exits may run ahead of what is told; 0: exits are final
  std::string salt;
};

struct Submission {
  std::vector<int32_t> prompt;
  int max_tokens = 1, min_loops = 1, max_loops = 1;
  bool score = false;
  std::vector<int32_t> stops;
  std::vector<int> depths;  // of every output token where exits are replayed
};

// A request whose next token is routed by the device from here on.
struct Start {
  int64_t id;
  int row, pos, slot;  // slot: of the bank, -1 for a token that runs from its first loop
};

// Stop ids of a request at whose draw the device ends it itself.
constexpr int kDeviceStops = 16;

// What a tick of the device drew, and what it ran.
struct Drawn {
  int64_t id;
  int32_t token, depth, filled;  // filled: positions that have all loops of the request
};
struct Ran {
  int rows = 0, current = 0, fills = 0, loops = 0;
};

// A token that stopped before the last loop; its hidden state waits in the bank.
struct Deferred {
  int pos, slot, loops;  // loops that have run
  bool chosen = false;
};

struct Request {
  enum class State { kWaiting, kPrefill, kReady, kRunning, kCoda, kStalled, kOffloaded, kFilling };
  int64_t id;
  Submission asked;
  State state = State::kWaiting;
  std::vector<int32_t> tokens;  // of prompt and output
  int outputs = 0, row = -1;
  std::vector<int> pages;
  int pos = 0, slot = -1, loop = 0, depth = 0;  // of the token that runs
  int64_t since = 0;                            // step in which it became ready
  std::vector<Deferred> deferred;
  std::vector<Deferred> checks;  // have all loops, wait for the head
  std::deque<int> drafted;       // depths of outputs that are not told
  int told = 0;                  // outputs
  bool left = false;             // the token that runs waits for the head
  bool draining = false, cancelled = false;
  // prompt rows [begin, begin + slots.size()) stand at chunk_loop
  int begin = 0, target = 0, chunk_loop = 0;
  std::vector<int> slots;
  std::vector<uint8_t> saved_marks;  // while offloaded
};

struct Counters {
  int64_t ticks = 0, blocks = 0, codas = 0, mixed_blocks = 0, rows = 0, current_rows = 0,
          fill_rows = 0, prompt_rows = 0, coda_rows = 0, distinct_loops = 0, outputs = 0,
          exit_loops = 0, prompt_tokens = 0, cached_tokens = 0, preemptions = 0, offloads = 0,
          most_wait = 0, most_ready = 0, finished = 0, cancelled = 0, dropped_fills = 0,
          accepted = 0, rejected = 0;
};

// The step to run: buffers of fixed place, counts for this step.
struct Plan {
  Stage stage = Stage::kIdle;
  int n = 0;
  std::vector<int32_t> slot, pos, row, loop, kind, token;  // rows of a block, sorted by loop
  std::vector<int32_t> depth, output, end;                 // of a coda
  std::vector<int64_t> id;
  std::vector<int32_t> seg;                            // [B + 1]
  std::vector<int32_t> moved_pages, moved_slots;       // of an offload or a restore
  std::vector<std::pair<int64_t, int>> opened, ended;  // (request, row), (request, End)
  std::vector<int> closed;                             // rows, before `opened`
};

class Scheduler {
 public:
  explicit Scheduler(Options options);

  int64_t submit(Submission submission);  // throws std::invalid_argument
  bool cancel(int64_t id);                // false for one that is gone
  bool has_work() const { return live_ > 0 || !closed_.empty() || !ended_.empty(); }

  const Plan& plan();
  // exits: one byte per row of the block, only those of current tokens are read; null for none
  void report_block(const uint8_t* exits);
  // sets `output` and `end` of the plan's rows
  void report_coda(const int32_t* tokens);
  void report_score();
  void report_moved();
  void report_launched();  // of a tick; its tokens come with `report_drawn`
  // sets `output` and `end` of as many rows as there are tokens; an end of -1 for a request that is gone
  void report_drawn(const std::vector<Drawn>& drawn, const Ran& ran);
  // complete outputs whose owed loops have run
  void report_filled(const std::vector<int64_t>& ids);
  // Requests that the device takes over and rows that it lets go, rows first; each is told once.
  std::pair<std::vector<int>, std::vector<Start>> handed();
  const std::vector<int32_t>& limits() const { return limits_; }

  void check() const;  // throws std::logic_error where anything is lost or held twice
  void forget_prefixes() { pages_.forget(); }

  const Options& options() const { return options_; }
  const Plan& current() const { return plan_; }
  const Counters& counters() const { return counters_; }
  const std::vector<int64_t>& exits() const { return exits_; }
  const std::vector<int32_t>& tables() const { return tables_; }
  Pages& pages() { return pages_; }
  const Slots& slots() const { return slots_; }
  const Request* find(int64_t id) const;
  std::vector<int> queues() const;  // waiting, prefill, ready, coda, stalled, offloaded, filling

 private:
  using State = Request::State;
  bool exact() const { return options_.fills == Fills::kLazy || options_.fills == Fills::kEager; }
  bool waves() const { return options_.mode != Mode::kDepth; }
  bool pass_runs() const { return !pass_.empty() || prompt_slots_ > 0; }

  // scheduler.cpp: requests and memory
  void admit();
  bool place(Request& r);
  int take_page();
  void add_page(Request& r, int page);
  bool begin_token(Request& r, bool resumed);
  void retry_stalled();
  bool relieve();
  bool plan_restore();
  void give_memory(Request& r);
  void leave_queues(Request& r);
  void release(Request& r);
  void end(Request& r);
  void publish(Request& r);
  void bury();
  bool plan_routed();
  void route(Request& r);
  void start(Request& r, int slot);
  End take_token(Request& r, int32_t token);
  End end_of(const Request& r, int32_t token, int outputs) const;
  // scheduler_drafts.cpp: exits that are checked
  void add_check(Request& r, const Deferred& item);
  void hold(Request& r);
  void hold_drafts(Request& r);
  void roll_back(Request& r, size_t size);
  End tell(Request& r, int row, int depth);
  void read(Request& r, int row, int last, const int32_t* tokens);
  bool cover(Request& r);
  void cover_ahead(Request& r);
  void retry_routed();
  void stop_row(const Request& r);
  bool owes_at_end(const Request& r, int filled) const;
  void mark_filled(Request& r, int positions);
  void begin_plan(Stage stage);
  void end_plan(Stage stage);

  // scheduler_step.cpp: steps
  struct Row {
    Request* request;
    int slot, pos, loop, item;  // item: of request->deferred, -1 the current token, -2 a prompt
  };
  bool block_work() const;
  void plan_block();
  void plan_coda();
  void add_reading(Request& r, int slot, int pos, int depth);
  void plan_score();
  bool starts_prompts();
  void add_prompts(bool start);
  int room() const { return options_.width + options_.fill_rows - static_cast<int>(rows_.size()); }
  bool add_current(Request& r);
  void add_fills(Request& r, int most, bool due);
  void add_spare_fills();
  void lay_out();
  void verify_rows() const;
  void ran(Request& r, bool signal);
  void chunk_ran(Request& r);
  void chunk_done(Request& r);
  void settle_fills(Request& r);
  std::vector<Request*> candidates();

  Options options_;
  Pages pages_;
  Slots slots_;
  std::vector<int> free_rows_;
  std::vector<int32_t> tables_;  // [R, request_pages]
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  std::deque<Request*> waiting_, prefill_, ready_, coda_, scores_, stalled_, offloaded_, filling_;
  std::vector<Request*> pass_;  // of a mode with waves
  bool prompts_turn_ = false, outstanding_ = false;
  std::vector<Request*> resident_;  // by row, null where free
  int active_ = 0;                  // requests that hold pages
  int live_ = 0;                    // requests that are not released
  int prompt_slots_ = 0;            // of chunks that run
  int spare_turn_ = 0;
  std::vector<Row> rows_;
  std::vector<Request*> step_;  // requests of the step's rows, of its coda, or the one that moves
  std::vector<int64_t> dead_;
  std::vector<int> closed_;
  std::vector<std::pair<int64_t, int>> opened_, ended_;
  std::vector<Start> started_;
  std::vector<int> stopped_;
  std::vector<int32_t> limits_;  // [R] positions that have pages
  int64_t next_id_ = 1;
  Plan plan_;
  Counters counters_;
  std::vector<int64_t> exits_;  // [B]
};

}  // namespace gemma_ext::host
