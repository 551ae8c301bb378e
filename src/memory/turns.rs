//! Whose turn it is: what several clients want done, one after the other, and of none too much at once.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// What waits, by client.
#[derive(Debug)]
pub(super) struct Turns<C, T> {
    /// What one client may have under way.
    at_once: usize,
    shares: HashMap<C, Share<T>>,
    /// Those with something that may begin, each once.
    order: VecDeque<C>,
}

#[derive(Debug)]
struct Share<T> {
    waiting: VecDeque<T>,
    under_way: usize,
    is_in_order: bool,
}

impl<C: Copy + Eq + Hash, T> Turns<C, T> {
    pub(super) fn new(at_once: usize) -> Self {
        Self { at_once, shares: HashMap::new(), order: VecDeque::new() }
    }

    /// Something that a client wants done.
    pub(super) fn push(&mut self, client: C, item: T) {
        self.share(client).waiting.push_back(item);
        self.line_up(client);
    }

    /// What is next, under way from now on, until [`done`](Self::done).
    pub(super) fn next(&mut self) -> Option<(C, T)> {
        let client = self.order.pop_front()?;
        let share = self.shares.get_mut(&client)?;
        share.is_in_order = false;
        let item = share.waiting.pop_front()?;
        share.under_way += 1;
        self.line_up(client);
        Some((client, item))
    }

    /// What is under way was not begun after all, and is its client's next.
    pub(super) fn put_back(&mut self, client: C, item: T) {
        let share = self.share(client);
        share.waiting.push_front(item);
        share.under_way = share.under_way.saturating_sub(1);
        self.line_up(client);
    }

    /// Something of a client is under way no more.
    pub(super) fn done(&mut self, client: C) {
        let Some(share) = self.shares.get_mut(&client) else { return };
        share.under_way = share.under_way.saturating_sub(1);
        if share.under_way == 0 && share.waiting.is_empty() {
            self.shares.remove(&client);
        }
        self.line_up(client);
    }

    /// Takes what a client wants done and has not begun.
    pub(super) fn take_waiting(&mut self, client: C) -> VecDeque<T> {
        let Some(share) = self.shares.get_mut(&client) else { return VecDeque::new() };
        let waiting = std::mem::take(&mut share.waiting);
        share.is_in_order = false;
        if share.under_way == 0 {
            self.shares.remove(&client);
        }
        self.order.retain(|other| *other != client);
        waiting
    }

    /// Whether nobody wants anything done that could begin.
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn share(&mut self, client: C) -> &mut Share<T> {
        let new = || Share { waiting: VecDeque::new(), under_way: 0, is_in_order: false };
        self.shares.entry(client).or_insert_with(new)
    }

    fn line_up(&mut self, client: C) {
        if let Some(share) = self.shares.get_mut(&client)
            && !share.waiting.is_empty()
            && share.under_way < self.at_once
            && !std::mem::replace(&mut share.is_in_order, true)
        {
            self.order.push_back(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns_and_none_has_too_much_under_way() {
        let mut turns = Turns::new(2);
        (0..4).for_each(|item| turns.push('a', item));
        turns.push('b', 10);
        assert_eq!(turns.next(), Some(('a', 0)));
        assert_eq!(turns.next(), Some(('b', 10)));
        assert_eq!(turns.next(), Some(('a', 1)));
        assert!(turns.is_empty() && turns.next().is_none(), "two of a's are under way");
        turns.done('b');
        turns.done('a');
        assert_eq!(turns.next(), Some(('a', 2)));
        turns.put_back('a', 2);
        assert_eq!(turns.next(), Some(('a', 2)));
        assert!(turns.is_empty(), "two of them again");
        turns.done('a');
        assert!(!turns.is_empty());
        assert_eq!(turns.take_waiting('a'), [3]);
        assert!(turns.is_empty(), "nobody is called for nothing");
        turns.push('a', 6);
        assert_eq!(turns.next(), Some(('a', 6)));
        turns.done('a');
        turns.done('a');
        assert!(turns.next().is_none() && turns.shares.is_empty());
        // One who comes again is a client as any.
        turns.push('a', 4);
        assert_eq!(turns.take_waiting('a'), [4]);
        assert!(turns.is_empty() && turns.shares.is_empty());
        turns.push('a', 5);
        assert_eq!(turns.next(), Some(('a', 5)));
    }
}
