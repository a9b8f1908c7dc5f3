// What models share in taking weights by name and checking that all came.
#pragma once

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"

namespace flatout {

inline void expect(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Where weight "layers.I.FIELD" goes, by the fields of a layer; null for any other name.
template <class Layer, class T>
T* layer_field(std::vector<Layer>& layers, const std::string& name,
               std::initializer_list<std::pair<const char*, T Layer::*>> fields) {
  int layer = -1;
  char field[32] = {};
  if (std::sscanf(name.c_str(), "layers.%d.%31s", &layer, field) != 2 || layer < 0 || layer >= (int)layers.size())
    return nullptr;
  for (const auto& [known, member] : fields)
    if (field == std::string(known)) return &(layers[layer].*member);
  return nullptr;
}

inline void check_vector(const std::vector<float>& v, int n, const std::string& name) {
  expect((int)v.size() == n, name + " is missing or has the wrong length");
}

// Checks linears, and notes what the activation buffers must hold for the widest.
struct LinearChecks {
  int widest = 0, most_groups = 0;
  void check(const Linear& w, int n, int k, const std::string& name) {
    expect(w.n == n && w.k == k, name + " is missing or has the wrong shape");
    widest = std::max(widest, w.row_stride);
    most_groups = std::max(most_groups, w.groups);
  }
};

}  // namespace flatout
