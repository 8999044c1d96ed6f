//! Maps from pages to values, as runs of neighbouring pages that have one value.
//!
//! Owns: the order of the runs, and that they never overlap. Does not own: what the values mean.

/// Pages `start..end`, which are not none, with one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span<V> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) value: V,
}

impl<V> Span<V> {
    pub(super) const fn pages(&self) -> u64 {
        self.end - self.start
    }
}

/// Sorted: `spans[i].end <= spans[i + 1].start`, and where they touch the values differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spans<V>(Vec<Span<V>>);

impl<V> Default for Spans<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V: Copy + PartialEq> Spans<V> {
    /// Adds pages behind all others, or none.
    pub(super) fn push(&mut self, span: Span<V>) {
        debug_assert!(self.0.last().is_none_or(|last| last.end <= span.start), "spans come in order");
        match self.0.last_mut() {
            _ if span.start >= span.end => {}
            Some(last) if last.end == span.start && last.value == span.value => last.end = span.end,
            _ => self.0.push(span),
        }
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Span<V>> {
        self.0.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn pages(&self) -> u64 {
        self.0.iter().map(Span::pages).sum()
    }

    /// The pages of both maps, with what `choose` makes of their values; `None` leaves a page out. One pass.
    pub(super) fn combine<W: Copy, X: Copy + PartialEq>(
        &self,
        other: &Spans<W>,
        choose: impl Fn(Option<V>, Option<W>) -> Option<X>,
    ) -> Spans<X> {
        let (mut ours, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut combined = Spans::default();
        let mut at = 0;
        loop {
            // The value of the span that `at` lies in, if it lies in one, and where that ends or the next begins.
            let (our_value, our_border) = here(ours.peek().copied(), at);
            let (their_value, their_border) = here(theirs.peek().copied(), at);
            let end = our_border.min(their_border);
            if end == u64::MAX {
                return combined;
            }
            if (our_value.is_some() || their_value.is_some())
                && let Some(value) = choose(our_value, their_value)
            {
                combined.push(Span { start: at, end, value });
            }
            at = end;
            ours.next_if(|span| span.end <= at);
            theirs.next_if(|span| span.end <= at);
        }
    }

    /// The same with at most so many pages and spans: those with the lowest `rank` stay. Of equal ones the first.
    pub(super) fn bounded(self, pages: u64, spans: usize, rank: impl Fn(&V) -> u32) -> Self {
        if self.0.len() <= spans && self.pages() <= pages {
            return self;
        }
        let mut ranked = self.0;
        ranked.sort_by_key(|span| rank(&span.value));
        ranked.truncate(spans);
        let mut left = pages;
        for span in &mut ranked {
            span.end = span.start + span.pages().min(left);
            left -= span.pages();
        }
        ranked.sort_unstable_by_key(|span| span.start);
        ranked.into_iter().fold(Self::default(), |mut kept, span| {
            kept.push(span);
            kept
        })
    }
}

/// The value at `at`, and how far that is so. `span` is the first that does not end before `at`.
fn here<V: Copy>(span: Option<&Span<V>>, at: u64) -> (Option<V>, u64) {
    match span {
        None => (None, u64::MAX),
        Some(span) if at < span.start => (None, span.start),
        Some(span) => (Some(span.value), span.end),
    }
}

/// Marks pages of one map after the other, first come first kept; for whoever gathers pages in any order.
#[derive(Debug, Default)]
pub(super) struct FirstCome<V>(std::collections::BTreeMap<u64, (u64, V)>);

impl<V: Copy + PartialEq> FirstCome<V> {
    pub(super) const fn new() -> Self {
        Self(std::collections::BTreeMap::new())
    }

    /// Gives `value` to those of the pages `start..end` that have none, as long as `room` lasts, which counts spans.
    pub(super) fn fill(&mut self, start: u64, end: u64, value: V, room: &mut impl FnMut() -> bool) {
        let mut at = start;
        while at < end {
            let before = self.0.range_mut(..=at).next_back();
            if let Some((_, (covered, _))) = before.filter(|(_, (covered, _))| *covered > at) {
                at = *covered;
                continue;
            }
            let gap_end = self.0.range(at..end).next().map_or(end, |(next, _)| *next);
            match self.0.range_mut(..at).next_back() {
                Some((_, (last, same))) if *last == at && *same == value => *last = gap_end,
                _ if room() => drop(self.0.insert(at, (gap_end, value))),
                _ => return,
            }
            at = gap_end;
        }
    }

    pub(super) fn to_spans(&self) -> Spans<V> {
        let mut spans = Spans(Vec::with_capacity(self.0.len()));
        for (&start, &(end, value)) in &self.0 {
            spans.push(Span { start, end, value });
        }
        spans
    }
}

impl<V: Copy + PartialEq> FromIterator<Span<V>> for Spans<V> {
    /// From spans in order.
    fn from_iter<I: IntoIterator<Item = Span<V>>>(spans: I) -> Self {
        spans.into_iter().fold(Self::default(), |mut all, span| {
            all.push(span);
            all
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The oracle: a value for each page.
    pub(in crate::fill::profile) type Naive<V> = BTreeMap<u64, V>;

    pub(in crate::fill::profile) fn naive<V: Copy>(spans: &Spans<V>) -> Naive<V> {
        spans.0.iter().flat_map(|span| (span.start..span.end).map(|page| (page, span.value))).collect()
    }

    pub(in crate::fill::profile) fn of_naive<V: Copy + PartialEq>(pages: &Naive<V>) -> Spans<V> {
        pages.iter().map(|(&page, &value)| Span { start: page, end: page + 1, value }).collect()
    }

    fn values() -> impl Strategy<Value = Naive<u32>> {
        prop::collection::btree_map(0u64..60, 0u32..4, 0..50)
    }

    fn is_sound<V: Copy + PartialEq>(spans: &Spans<V>) -> bool {
        let apart = |pair: &[Span<V>]| {
            pair[0].end < pair[1].start || (pair[0].end == pair[1].start && pair[0].value != pair[1].value)
        };
        spans.0.windows(2).all(apart) && spans.0.iter().all(|span| span.start < span.end)
    }

    proptest! {
        #[test]
        fn two_maps_combine_page_by_page(one in values(), other in values()) {
            let choose = |one: Option<u32>, other: Option<u32>| match (one, other) {
                (Some(one), Some(other)) => (one != other).then_some(one * 10 + other),
                (one, other) => one.or(other),
            };
            let combined = of_naive(&one).combine(&of_naive(&other), choose);
            prop_assert!(is_sound(&combined));
            let pages: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).copied().collect();
            let wanted: Naive<u32> = pages.into_iter()
                .filter_map(|page| Some((page, choose(one.get(&page).copied(), other.get(&page).copied())?)))
                .collect();
            prop_assert_eq!(naive(&combined), wanted);
        }

        #[test]
        fn what_ranks_lowest_stays_within_bounds(map in values(), pages in 0u64..60, count in 0usize..30) {
            let whole = of_naive(&map);
            let kept = whole.clone().bounded(pages, count, |value| *value);
            prop_assert!(is_sound(&kept) && kept.pages() <= pages && kept.len() <= count);
            let kept_pages = naive(&kept);
            prop_assert!(kept_pages.iter().all(|(page, value)| map.get(page) == Some(value)));
            let worst_kept = kept_pages.values().max();
            let best_lost = map.iter().filter(|(page, _)| !kept_pages.contains_key(page)).map(|(_, value)| value).min();
            if let (Some(kept), Some(lost)) = (worst_kept, best_lost) {
                prop_assert!(kept <= lost);
            }
            if whole.len() <= count {
                prop_assert_eq!(kept.pages(), whole.pages().min(pages));
            }
        }

        #[test]
        fn who_comes_first_is_kept(fills in prop::collection::vec((0u64..60, 0u64..20, 0u32..4), 0..20), most in 0usize..40) {
            let (mut gathered, mut naive_pages) = (FirstCome::new(), Naive::new());
            let mut left = most;
            for (start, length, value) in fills {
                gathered.fill(start, start + length, value, &mut || { let fits = left > 0; left -= usize::from(fits); fits });
                (start..start + length).for_each(|page| { naive_pages.entry(page).or_insert(value); });
            }
            let spans = gathered.to_spans();
            prop_assert!(spans.len() <= most);
            prop_assert!(is_sound(&spans));
            if left > 0 {
                prop_assert_eq!(naive(&spans), naive_pages);
            }
        }
    }
}
