// How many threads take part in a step, when another process wants a core too.
//
// Threads meet over a hundred times a token, so one that must share its core holds up all others: with two threads beside
// one busy process, a token takes four times as long as alone, and one thread by itself is twice as fast as both. So when
// steps have become slow, one thread fewer is tried, and kept while that is faster.
#pragma once

#include <algorithm>

namespace flatout {

class Pace {
 public:
  static constexpr int kMostTokens = 16;  // of the steps that are paced: longer ones meet seldom for what they do

  explicit Pace(int threads) : threads_(threads) {}

  // Threads of the next step, which has this many tokens.
  int team(int tokens) {
    if (tokens != tokens_) usual_ = all_ = few_ = 0, tokens_ = tokens;  // other steps take other times
    return fewer_ ? threads_ - 1 : threads_;
  }

  // What the step took.
  void took(double seconds) {
    if (threads_ == 1) return;
    if (fewer_) {
      few_ = few_ == 0 ? seconds : 0.75 * few_ + 0.25 * seconds;
      if (trial_ > 0) {
        if (--trial_ > 0) return;
        fewer_ = few_ <= 0.9 * all_;  // if not, something else made steps slow
        hold_ = kHold;
      } else if (--hold_ <= 0) {
        fewer_ = false, trial_ = kTrial, all_ = 0;  // are the others gone?
      }
      return;
    }
    all_ = all_ == 0 ? seconds : 0.75 * all_ + 0.25 * seconds;
    if (trial_ > 0) {
      if (--trial_ > 0) return;
      patience_ = all_ > 0.9 * few_ ? std::min(2 * patience_, kMostHold) : kHold;
      fewer_ = all_ > 0.9 * few_;
      hold_ = patience_;
      if (!fewer_) usual_ = all_;
      return;
    }
    usual_ = usual_ == 0 ? seconds : std::min(seconds, 1.002 * usual_);  // follows a growing context
    slow_ = std::clamp(slow_ + (seconds > kSlow * usual_ ? 1 : -1), 0, kTrial);
    if (hold_ > 0) {
      --hold_;
    } else if (slow_ == kTrial) {
      fewer_ = true, trial_ = kTrial, few_ = 0, slow_ = 0;
    }
  }

 private:
  static constexpr int kTrial = 4, kHold = 32, kMostHold = 256;  // steps
  static constexpr double kSlow = 1.6;
  int threads_, tokens_ = 0;
  bool fewer_ = false;
  int slow_ = 0;  // slow steps lately, less quick ones
  int trial_ = 0, hold_ = 8, patience_ = kHold;  // steps until a trial ends; until the next may begin
  double usual_ = 0, all_ = 0, few_ = 0;         // seconds: least, and lately, with all threads and with one fewer
};

}  // namespace flatout
