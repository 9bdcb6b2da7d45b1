// ProcessGroupGloo whose all-gather and reduce-scatter of one tensor work in place. c10d's own copy whole buffers: an
// all-gather passes through a second output, and a reduce-scatter is an all-reduce of a clone of its input.
//
// Here ranks exchange messages that Gloo reads from and writes to the tensors themselves; a thread per group waits for
// them and adds up, so that a collective goes on while the caller computes. With R ranks and slices of S bytes each rank
// sends and receives (R - 1) S bytes in either collective.
//
// - All-gather is a ring: every slice travels from each rank to the next, so that it crosses to another node once where
//   ranks are numbered by node.
// - Reduce-scatter sends every slice to its owner, in pieces, and the owner combines them in the order of ranks
//   (((x0 + x1) + x2) + ...), in the tensor's dtype: the same result every time, whoever is faster.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/thread_name.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <omp.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace corral {

class GlooInPlace final : public c10d::ProcessGroupGloo {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using c10d::ProcessGroupGloo::ProcessGroupGloo;

  ~GlooInPlace() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_one();
    if (worker_.joinable()) worker_.join();
  }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions&) override {
    return start(c10d::OpType::_ALLGATHER_BASE,
                 [this, output, input](int tag) { all_gather(output, input, tag); });
  }

  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    const auto op = static_cast<c10d::ReduceOp::RedOpType>(options.reduceOp);
    return start(c10d::OpType::_REDUCE_SCATTER_BASE,
                 [this, output, input, op](int tag) { reduce_scatter(output, input, op, tag); });
  }

  // Of two ranks, one of which sends what the other receives. c10d's own works close the connection when a wait for them ends before
  // they do, and our waits are short looks.
  WorkPtr transfer_to(int rank, const at::Tensor& t) {
    return start(c10d::OpType::SEND, [this, rank, t](int tag) { send_to(rank, t, tag)->wait(); });
  }

  WorkPtr transfer_from(int rank, const at::Tensor& t) {
    return start(c10d::OpType::RECV, [this, rank, t](int tag) { receive_from(rank, t, tag)->wait(); });
  }

 private:
  // A collective, or a transfer, on the group's thread.
  struct Exchange final : c10d::Work {
    Exchange(int rank, c10d::OpType op, std::function<void()> body) : Work(rank, op), body(std::move(body)) {}

    void run() {
      std::exception_ptr error;
      try {
        body();
      } catch (...) {
        error = std::current_exception();
      }
      body = nullptr;  // lets go of the tensors before anybody hears of the end
      finish(error);
    }

    std::function<void()> body;
  };

  // Bytes of what is received and not added yet, over all peers.
  static constexpr int64_t kScratch = 8 << 20;
  static constexpr int64_t kLargestPiece = 1 << 20;
  static constexpr int64_t kSmallestPiece = 64 << 10;

  WorkPtr start(c10d::OpType op, std::function<void(int)> body) {
    // All ranks call these collectives in the same order: that is what matches their messages. Gloo keeps the tags of
    // messages apart from those of its own collectives.
    const int tag = static_cast<int>(next_tag_++ & 0x7fffffff);
    auto exchange = c10::make_intrusive<Exchange>(getRank(), op, [body = std::move(body), tag] { body(tag); });
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(exchange);
      if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
    }
    changed_.notify_one();
    return exchange;
  }

  void work() {
    c10::setThreadName("corral_gloo");
    // Sums on this thread alone: the cores compute. (The call before makes libtorch's own choice, which would come later.)
    at::get_num_threads();
    omp_set_num_threads(1);
    while (true) {
      c10::intrusive_ptr<Exchange> next;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        if (queue_.empty()) return;
        next = std::move(queue_.front());
        queue_.pop_front();
      }
      next->run();
    }
  }

  WorkPtr send_to(int rank, at::Tensor t, int tag) {
    std::vector<at::Tensor> tensors{std::move(t)};
    return send(tensors, rank, tag);
  }

  WorkPtr receive_from(int rank, at::Tensor t, int tag) {
    std::vector<at::Tensor> tensors{std::move(t)};
    return recv(tensors, rank, tag);
  }

  void all_gather(const at::Tensor& output, const at::Tensor& input, int tag) {
    if (input.numel() == 0) return;
    const int size = getSize(), rank = getRank();
    const int left = (rank + size - 1) % size, right = (rank + 1) % size;
    const at::Tensor slices = output.view({size, -1});
    // The slice that comes in step k, and leaves in step k + 1.
    auto slice = [&](int k) { return slices[(rank - k + size) % size]; };
    std::vector<WorkPtr> received, sent;
    for (int k = 1; k < size; ++k) received.push_back(receive_from(left, slice(k), tag));
    if (size > 1) sent.push_back(send_to(right, input.view(-1), tag));
    if (slice(0).data_ptr() != input.data_ptr()) slice(0).copy_(input.view(-1));
    for (int k = 1; k < size; ++k) {
      received[k - 1]->wait();
      if (k + 1 < size) sent.push_back(send_to(right, slice(k), tag));
    }
    for (auto& work : sent) work->wait();
  }

  static void combine(c10d::ReduceOp::RedOpType op, at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    switch (op) {
      case c10d::ReduceOp::SUM: at::add_out(out, a, b); return;
      case c10d::ReduceOp::MAX: at::maximum_out(out, a, b); return;
      case c10d::ReduceOp::MIN: at::minimum_out(out, a, b); return;
      default: TORCH_CHECK(false, "reduce-scatter: this reduction is not known");
    }
  }

  void reduce_scatter(const at::Tensor& output, const at::Tensor& input, c10d::ReduceOp::RedOpType op, int tag) {
    if (output.numel() == 0) return;
    const int size = getSize(), rank = getRank();
    const at::Tensor out = output.view(-1), slices = input.view({size, -1});
    if (size == 1) {
      out.copy_(slices[0]);
      return;
    }
    // Two pieces of every peer: one is received while the other is added.
    const int64_t most = std::clamp(kScratch / (2 * (size - 1)), kSmallestPiece, kLargestPiece);
    const int64_t piece = std::min(most / static_cast<int64_t>(out.element_size()), out.numel());
    const int64_t num_pieces = (out.numel() + piece - 1) / piece;
    const at::Tensor scratch = at::empty({2, size, piece}, out.options());
    auto length = [&](int64_t p) { return std::min(piece, out.numel() - p * piece); };
    auto received = [&](int64_t p, int from) { return scratch[p % 2][from].narrow(0, 0, length(p)); };

    std::vector<WorkPtr> sent;
    std::vector<WorkPtr> receiving[2];
    auto post = [&](int64_t p) {
      for (int k = 1; k < size; ++k) {
        const int from = (rank - k + size) % size;
        receiving[p % 2].push_back(receive_from(from, received(p, from), tag));
      }
      for (int k = 1; k < size; ++k) {
        const int to = (rank + k) % size;
        sent.push_back(send_to(to, slices[to].narrow(0, p * piece, length(p)), tag));
      }
    };
    for (int64_t p = 0; p < std::min<int64_t>(2, num_pieces); ++p) post(p);
    for (int64_t p = 0; p < num_pieces; ++p) {
      for (auto& work : receiving[p % 2]) work->wait();
      receiving[p % 2].clear();
      const at::Tensor target = out.narrow(0, p * piece, length(p));
      auto part = [&](int r) {
        return r == rank ? slices[rank].narrow(0, p * piece, length(p)) : received(p, r);
      };
      combine(op, target, part(0), part(1));
      for (int r = 2; r < size; ++r) combine(op, target, target, part(r));
      if (p + 2 < num_pieces) post(p + 2);
    }
    for (auto& work : sent) work->wait();
  }

  uint32_t next_tag_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<c10::intrusive_ptr<Exchange>> queue_;
  bool closing_ = false;
  std::thread worker_;
};

}  // namespace corral
